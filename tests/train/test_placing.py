"""Models that no Trainer places are used on the GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaw.errors import RunError
from deltaw.language import merged
from deltaw.train import evaluate, predict
from deltaw.train import run as running
from deltaw.train.placing import place
from deltaw.train.recipe import parse


def test_without_a_gpu_a_model_stays_where_it_is() -> None:
    model = nn.Linear(2, 2)
    assert place(model) is model
    assert model.weight.device.type == "cpu"


def test_a_gpu_is_used_and_a_full_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Module] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: moved.append(self) or self)
    model = nn.Linear(2, 2)
    assert place(model) is model and moved == [model]

    def full(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "cuda", full)
    with pytest.raises(RunError, match=r"Linear does not fit[^§]*Fix: .*CUDA_VISIBLE_DEVICES=''"):
        place(model)


def test_runs_are_scored_and_asked_there(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    placed: list[nn.Module] = []
    for module in (evaluate, predict):
        monkeypatch.setattr(module, "place", lambda model: placed.append(model) or model)
    evaluate.evaluate_run(finished, None)
    predict.predict_run(finished, ["refund order 1 now"])
    assert len(placed) == 2


def test_a_gpu_that_fills_up_in_training_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(running.RecipeTrainer, "training_step", full)
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "max_steps": 1}
    with pytest.raises(RunError, match=r"no memory left: CUDA out[^§]*Fix: a smaller batch_size"):
        running.train(parse(values | {"output": str(tmp_path / "run")}), silent=True)


def test_an_adapter_that_cannot_be_merged_for_want_of_memory_stays_beside(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merged.deltaw, "merge", full)
    recipe = parse({"model": str(tiny / "model"), "data": str(tiny / "data.csv")})
    with merged.merged(nn.Linear(2, 2), recipe) as done:
        assert done == "adapter not merged: CUDA out of memory"
