"""A run killed at any moment and started again ends with the same bytes."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.train import killed
from tests.train.models import events, make_model, messages, write_csv

STEPS = 14
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    return {
        "model": str(make_model(folder / "model")),
        "data": str(write_csv(folder / "data.csv", messages(60))),
        "max_steps": STEPS,
        "eval_every": 3,
        "batch_size": 8,
        "gradient_accumulation": 2,
        "lora_dropout": 0.1,
        "learning_rate": 0.01,
    }


@pytest.fixture(scope="module")
def whole(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nothing disturbed: its folder, and how many moments it has."""
    output = tmp_path_factory.mktemp("whole") / "run"
    code, moments, message = killed.run(recipe | {"output": str(output)})
    assert (code, message) == (0, "")
    return output, moments


def course(run: Path) -> dict[object, object]:
    """The loss of every step and evaluation that the log holds, the latest of each."""
    logged = [event for event in events(run) if event["event"] == "step"]
    return {
        (name, event["step"]): event[name]
        for event in logged
        for name in ("loss", "eval_loss", "eval_accuracy")
        if name in event
    }


def assert_same(run: Path, whole: Path) -> None:
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert course(run) == course(whole)


def kill_and_resume(
    recipe: dict[str, Any], output: Path, whole: tuple[Path, int], moment: int
) -> None:
    values = recipe | {"output": str(output)}
    code, _, _ = killed.run(values, moment=moment)
    assert code == -signal.SIGKILL
    code, _, message = killed.run(values)
    finished = "holds a finished run" in message  # killed after the last file was written
    assert code == (1 if finished else 0), message
    assert_same(output, whole[0])
    left = [path.name for path in output.iterdir() if path.name.startswith((".p", ".r"))]
    assert finished or left == []


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_ends_with_the_same_bytes(
    recipe: dict[str, Any], whole: tuple[Path, int], tmp_path: Path, seed: int
) -> None:
    _, moments = whole
    kill_and_resume(
        recipe, tmp_path / "run", whole, random.Random(seed).randint(moments // 4, moments)
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_run_killed_in_each_twentieth_ends_with_the_same_bytes(
    recipe: dict[str, Any], whole: tuple[Path, int], tmp_path: Path, part: int
) -> None:
    _, moments = whole
    low, high = 1 + part * moments // 20, (part + 1) * moments // 20
    kill_and_resume(recipe, tmp_path / "run", whole, random.Random(part).randint(low, high))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_ends_with_the_same_bytes(
    recipe: dict[str, Any], whole: tuple[Path, int], tmp_path: Path, sent: signal.Signals
) -> None:
    reference, moments = whole
    values = recipe | {"output": str(tmp_path / "run")}
    code, _, message = killed.run(values, moment=moments // 2, sent=sent)
    assert code == 128 + sent
    assert "The same command goes on from there" in message
    step = int(message.split("Stopped in step ")[1].split()[0])
    assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    assert killed.run(values)[0] == 0
    said = [str(event.get("text")) for event in events(tmp_path / "run")]
    assert any(f"goes on from step {step} of {STEPS}" in text for text in said)
    assert any("since the run was resumed" in text for text in said)
    assert_same(tmp_path / "run", reference)
