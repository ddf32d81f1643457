"""Two processes train what one does, to the same weights and files, and each goes on for one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.language.models import conversations, write_json
from tests.language.models import make_model as make_talker
from tests.train import together
from tests.train.models import events, make_model, messages, write_csv
from tests.train.together import Task

from deltaw.language.choosing import preparation, settle
from deltaw.train import run as running
from deltaw.train import yamlfile
from deltaw.train.interrupt import Stopped
from deltaw.train.loop import Flow
from deltaw.train.recipe import parse
from deltaw.train.runfolder import read_results

ADAPTER = "adapter_model.safetensors"
STOPPED = "Stopped in step 3 of 6; the checkpoint is saved.\nThe same command goes on from there."


def start(values: dict[str, Any]) -> Path:
    recipe = settle(parse(values))
    return running.train(recipe, silent=True, prepare=preparation(recipe))


def steps(run: Path) -> dict[tuple[str, int], float]:
    """Every loss, norm and score that the log holds, the latest of each."""
    return {
        (name, event["step"]): event[name]
        for event in events(run)
        if event["event"] == "step"
        for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "learning_rate")
        if name in event
    }


def assert_equal(run: Path, whole: Path, weights: str = ADAPTER, close: float = 1e-5) -> None:
    """Weights by distance, losses and scores relatively."""
    found, wanted = load_file(run / weights), load_file(whole / weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=close, msg=name)
    assert steps(run) == pytest.approx(steps(whole), rel=close)
    for part in ("before", "after"):
        ours, theirs = read_results(run)[part], read_results(whole)[part]
        assert ours["values"] == pytest.approx(theirs["values"], rel=10 * close)
    if (whole / "config.json").exists():
        assert (run / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, whole)]
    assert names[0] == names[1]
    assert (run / "recipe.yaml").read_text().count("\n") == (
        (whole / "recipe.yaml").read_text().count("\n")
    )


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("together")
    return {
        "model": str(make_talker(folder / "model")),
        "data": str(write_json(folder / "data.json", conversations(18))),
        "max_steps": 6,
        "eval_every": 2,
        "batch_size": 5,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "samples": 0,
        "validation_share": 2,
    }


def interrupted(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run and stop it after its third step."""
    real = running.RecipeTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(self, *args, **kwargs)
        if self.state.global_step == 2:
            (flow,) = [c for c in self.callback_handler.callbacks if isinstance(c, Flow)]
            flow.interrupt.number = signal.SIGTERM
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(running.RecipeTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            start(values)


def both(
    values: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> None:
    """One process and two, and each begun by the one and ended by the other.

    16 rows in batches of 5 leave a last one of a single row, of which the second process has none.
    """
    weights = "model.safetensors" if more.get("method") == "full" else ADAPTER
    close = 0.03 if more.get("bf16") else 1e-5
    made = {
        name: values | more | {"output": str(folder / name)}
        for name in ("whole", "two", "stopped", "begun")
    }
    few = values | {"output": str(folder / "few"), "batch_size": 1, "gradient_accumulation": 1}
    whole = start(made["whole"])
    interrupted(made["begun"], monkeypatch)
    ends = together.run(
        [
            Task(made["two"]),
            Task(made["stopped"], stopped=(1, 3)),
            Task(made["begun"]),
            Task(few),
        ]
    )
    assert [end[0] for end in ends] == ["", ""] and [end[2] for end in ends] == ["", ""]
    assert sorted(end[1] for end in ends) == [STOPPED, "ended with 143"]
    silent, said = sorted((end[3] for end in ends), key=len)
    assert silent == "ended with 1" and "batch_size=1 counts the rows of all processes" in said
    assert not (folder / "few").exists()
    assert_equal(folder / "two", whole, weights, close)
    assert_equal(folder / "begun", whole, weights, close)
    held = load_file(folder / "stopped" / "checkpoint-3" / "trained.safetensors")
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in held.values())
    assert_equal(start(made["stopped"]), whole, weights, close)


def test_two_processes_are_one(
    talking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(talking, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"packing": True, "gradient_accumulation": 1},
        {"target_modules": ["lm_head", "q_proj"]},
        {"method": "full", "optim": "galore_adamw", "galore_rank": 4},
        {"gradient_checkpointing": True, "use_dora": True, "init_lora_weights": "pissa"},
        {"early_stopping": 1, "eval_every": 1, "learning_rate": 1.0},
        {"metric": "chrf", "max_new_tokens": 4},
    ],
    ids=["packed", "head", "galore", "checkpointed", "early", "answers"],
)
def test_every_way_of_training(
    talking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    both(talking, tmp_path, monkeypatch, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"method": "full"}, {"use_dora": True, "bf16": True, "gradient_accumulation": 1}],
    ids=["lora", "full", "bf16"],
)
def test_weights_that_are_shared_out(
    talking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    both(talking, tmp_path, monkeypatch, fsdp=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_preferences(
    talking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    rows = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": "I do not know that."}
        for row in conversations(19)
    ]
    data = {"data": str(write_json(tmp_path / "pairs.json", rows))}
    both(talking, tmp_path, monkeypatch, **data, batch_size=6, pref_loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labelled_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    rows = messages(28)
    if task == "regression":
        rows = [(text, str(len(text) / 9)) for text, _ in rows]
    values = {
        "model": str(make_model(tmp_path / "model", dropout=0)),
        "data": str(write_csv(tmp_path / "data.csv", rows)),
        "task": task,
        "max_steps": 6,
        "eval_every": 2,
        "batch_size": 5,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "validation_share": 0.25,
    }
    both(values, tmp_path, monkeypatch)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[*TORCHRUN, "--rdzv-endpoint", "127.0.0.1:0"], [*ACCELERATE, "--main_process_port", "0"]],
    ids=["torchrun", "accelerate"],
)
def test_the_launchers_that_people_use(
    talking: dict[str, Any], tmp_path: Path, launcher: list[str]
) -> None:
    whole = start(talking | {"output": str(tmp_path / "whole")})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yamlfile.write(talking | {"output": str(tmp_path / "two")}, "Two."))
    command = [sys.executable, "-m", *launcher, "-m", "deltaw", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "step     6/6" in done.stdout
    assert "reducer.cpp" not in done.stderr and "[transformers]" not in done.stderr
    assert_equal(tmp_path / "two", whole)
