"""What a GPU would be waited for, seen on a CPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from deltaw.errors import DivergedError
from deltaw.train.batches import EpochSampler
from deltaw.train.distributed.shares import ShareSampler, loader
from deltaw.train.loop import arguments
from deltaw.train.recipe import parse
from deltaw.train.trainer import ExactCheckpoints


class OnGPU(Tensor):
    """A number that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


def numbered(value: float, *, gpu: bool) -> Tensor:
    return torch.tensor(value).as_subclass(OnGPU if gpu else Tensor)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExactCheckpoints:
    """A trainer whose losses are given, and whose gradient is of length 1."""
    made = ExactCheckpoints.__new__(ExactCheckpoints)
    made.state = SimpleNamespace(global_step=4)
    made.args = SimpleNamespace(
        output_dir=str(tmp_path), bf16=False, max_grad_norm=1.0, learning_rate=0.1
    )
    made.accelerator = SimpleNamespace(scaler=None)
    monkeypatch.setattr(Trainer, "training_step", lambda _, loss: loss)
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: None)
    return made


def test_losses_on_a_gpu_are_looked_at_once_a_step(trainer: ExactCheckpoints) -> None:
    looked: list[str] = []
    require = trainer.require_finite
    trainer.require_finite = lambda values, what, step: (
        looked.append(what) or require(values, what, step)
    )
    for _ in range(3):
        trainer.training_step(numbered(1.0, gpu=True))
    assert not looked
    trainer._get_grad_norm(torch.nn.Linear(1, 1))
    assert looked == ["The loss", "The gradient"]
    trainer.training_step(numbered(1.0, gpu=False))
    assert looked[2:] == ["The loss"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_loss_on_a_gpu_stops_its_step(trainer: ExactCheckpoints, broken: float) -> None:
    for value in (1.0, broken, 2.0):
        trainer.training_step(numbered(value, gpu=True))
    with pytest.raises(DivergedError, match=f"The loss became {broken} in step 5"):
        trainer._get_grad_norm(torch.nn.Linear(1, 1))
    trainer._get_grad_norm(torch.nn.Linear(1, 1))  # after a return to an earlier state
    trainer.training_step(numbered(broken, gpu=True))
    trainer._load_optimizer_and_scheduler(None)
    trainer._get_grad_norm(torch.nn.Linear(1, 1))


def test_a_broken_loss_on_a_cpu_stops_at_once(trainer: ExactCheckpoints) -> None:
    with pytest.raises(DivergedError, match="The loss became nan in step 5"):
        trainer.training_step(numbered(float("nan"), gpu=False))


@pytest.mark.parametrize("gpu", [True, False])
def test_batches_are_sent_to_a_gpu_without_waiting(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    def kind(**options: Any) -> Any:
        return SimpleNamespace(n_gpu=1, **options)

    rate = SimpleNamespace(value=0.1)
    plan = SimpleNamespace(steps=1, rate=rate, scheduler_kwargs={}, warmup=0, every=1)
    recipe = parse({"model": "m", "data": "d"})
    args = arguments(kind, recipe, Path(), plan, None)
    assert args.accelerator_config == {"non_blocking": gpu}
    assert args.dataloader_pin_memory == gpu
    shares = ShareSampler(EpochSampler([1, 2], 2, 0, bucketed=False), 0, 1)
    assert loader([1, 2], shares, dict).pin_memory == gpu
