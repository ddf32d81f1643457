"""Language models that are trained on noisy embeddings: who sees the noise, and who does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.language.models import write_json
from tests.language.test_continuing import job_of
from tests.language.test_ratings import ratings
from tests.train.conftest import Command
from torch import Tensor

from deltaw.language.choosing import train
from deltaw.language.training import judging, trainer, trying
from deltaw.train import loop
from deltaw.train import run as running
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.recipe import parse

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def values(talker: Path) -> dict[str, Any]:
    return {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "max_steps": 4,
        "eval_every": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "keep": "last",
    }


def start(values: dict[str, Any], output: Path, **more: Any) -> Path:
    return train(parse(values | {"output": str(output)} | more))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / WEIGHTS)


def differ(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return any(not torch.equal(mine[name], theirs[name]) for name in mine)


def hooks(model: Any) -> int:
    return len(model.get_input_embeddings()._forward_hooks)


def test_only_steps_have_noise(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {"scored": [], "generated": [], "stepped": []}
    measured, generate, step = trainer.scores.measured, trying.generate, loop.SharedTraining

    def scored(model: Any, *more: Any) -> Any:
        seen["scored"].append(hooks(model))
        return measured(model, *more)

    def generated(speaker: Any, *more: Any) -> Any:
        seen["generated"].append(hooks(speaker.model))
        return generate(speaker, *more)

    def stepped(self: Any, model: Any, *more: Any) -> Any:
        seen["stepped"].append(hooks(self.model))
        return plain_step(self, model, *more)

    plain_step = step.training_step
    monkeypatch.setattr(trainer.scores, "measured", scored)
    monkeypatch.setattr(trying, "generate", generated)
    monkeypatch.setattr(step, "training_step", stepped)
    start(values, tmp_path / "run", neftune_noise_alpha=5)
    assert seen["stepped"] == [1] * 4
    assert seen["scored"] and set(seen["scored"]) == {0}
    assert seen["generated"] and set(seen["generated"]) == {0}


def test_an_error_in_a_step_leaves_no_hook(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(values, neftune_noise_alpha=5)
    progress = running.make_progress(job, Console(silent=True))
    with Interrupt() as interrupt:
        made = job.trainer(tmp_path, interrupt, progress)

    def broken(*_: Any, **__: Any) -> None:
        assert hooks(job.model) == 1
        raise ArithmeticError

    monkeypatch.setattr(made, "compute_loss", broken)
    with pytest.raises(ArithmeticError):
        made.train()
    assert hooks(job.model) == 0


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_an_interrupted_run_draws_the_same_noise(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    plain = start(values, tmp_path / "plain", **more)
    more = {**more, "neftune_noise_alpha": 5}
    whole = start(values, tmp_path / "whole", **more)
    assert differ(whole, plain)
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            start(values, tmp_path / "run", **more)
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    run = start(values, tmp_path / "run", **more)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_of_judgements_the_trained_model_alone_has_noise(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    rows: list[dict[str, Any]] = ratings(25)
    if task == "dpo":
        rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(16)]
    data = str(write_json(tmp_path / "rows.json", rows))
    known, references = judging._known, []

    def noted(*arguments: Any) -> Any:
        found = known(*arguments)
        references.append((hooks(arguments[1]), found and found.reference))
        return found

    monkeypatch.setattr(judging, "_known", noted)
    more = {"data": data, "validation_share": 5, "samples": 0}
    plain = start(values, tmp_path / "plain", **more)
    count = len(references)
    noisy = start(values, tmp_path / "noisy", neftune_noise_alpha=5, **more)
    for (_, before), (hooked, after) in zip(references[:count], references[count:], strict=True):
        assert hooked == 0 and (before is after is None or (before == after).all())
    assert differ(noisy, plain)
    befores = [json.loads((run / "results.json").read_text())["before"] for run in (plain, noisy)]
    assert befores[0] == befores[1]


@pytest.mark.parametrize("alpha", ["5", "0", "null"])
def test_a_file_of_llama_factory_asks_for_it(
    values: dict[str, Any], tmp_path: Path, deltaw_command: Command, alpha: str
) -> None:
    lines = {
        "model_name_or_path": values["model"],
        "dataset": values["data"],
        "dataset_dir": "ONLINE",
        "stage": "sft",
        "finetuning_type": "lora",
        "max_steps": 2,
        "learning_rate": 0.01,
    }
    for name, more in (("plain", ""), ("asked", f"neftune_noise_alpha: {alpha}\n")):
        text = "".join(f"{key}: {value}\n" for key, value in lines.items())
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"{text}{more}output_dir: {tmp_path / name}\n")
        code, _, err = deltaw_command("train", file)
        assert code == 0, err
    assert differ(tmp_path / "asked", tmp_path / "plain") == (alpha == "5")
