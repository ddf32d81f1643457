"""A Trainer that notices when its loss leaves its course, and that can go on at a lower rate.

After a rollback every rate is multiplied by 1/2 from the checkpoint on, as OPT-175B was trained
through its divergences: from an earlier checkpoint, at a lower rate (arXiv 2205.01068, section
2.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.errors import DivergedError
from deltaw.train.checkpoint import read_state
from deltaw.train.distributed import processes
from deltaw.train.guarding.watchdog import Watchdog
from deltaw.train.saved import checkpoints_in, step_of
from deltaw.train.trainer import ExactCheckpoints

SLOWER = 0.5
MOST = 3
"""Rollbacks of one run."""


@dataclass(frozen=True)
class Rollback:
    """The step that went `wrong` and why, the step to go back `to`, the factor on rates since."""

    wrong: int
    to: int
    factor: float
    why: str

    def as_data(self) -> dict[str, Any]:
        """Return what a run records."""
        return {"wrong": self.wrong, "to": self.to, "factor": self.factor, "why": self.why}

    def __str__(self) -> str:
        return f"{self.why}\nback to step {self.to}, and on at {self.factor:g} times the rate"


class Guarded(ExactCheckpoints):
    """Exact checkpoints, a watchdog over the loss of every step, and rates that can be lowered."""

    watchdog: Watchdog | None = None
    rates: tuple[float, ...]
    slowed = 0
    """How often the rates were lowered."""
    _step_loss: torch.Tensor | float = 0.0

    def guard(self) -> None:
        """Watch the loss from now on."""
        self.watchdog = Watchdog()
        self.add_callback(self.watchdog)

    @property
    def went_wrong(self) -> int:
        """The first step whose loss or gradient was not as it should be, once the loop ended."""
        began = self.watchdog.began if self.watchdog is not None else None
        return began or int(self.state.global_step) + 1

    @property
    def rate_tried(self) -> float:
        """The highest rate that training goes by since the last return."""
        return float(super().rate_tried * SLOWER**self.slowed)

    def good_checkpoint(self) -> Path | None:
        """Return the newest checkpoint of weights that the wrong step did not begin with.

        What the first process sees counts for all, which call this together.
        """
        return processes.from_first(self._good_checkpoint)

    def _good_checkpoint(self) -> Path | None:
        found = checkpoints_in(Path(self.args.output_dir))
        good = [step for step in found if step < self.went_wrong - 1]
        return found[max(good)] if good else None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, and add its loss to that of the step."""
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        loss = processes.summed(float(self._step_loss)) / processes.count()
        self._step_loss = 0.0
        if self.watchdog is not None:
            self._watch(self.watchdog, loss)
        return norm

    def _watch(self, watchdog: Watchdog, loss: float) -> None:
        """Raise `DivergedError` before the weights move when the loss has left its course.

        Where no checkpoint is from before, there is nothing to go back to, and training goes on.
        """
        watchdog.see(self.state.global_step + 1, loss)
        if not watchdog.alarmed:
            return
        if self.good_checkpoint() is None:
            watchdog.accept()
            return
        raise DivergedError(
            f"The loss left its course: it was at most {max(watchdog.usual):.3g}, and "
            f"{min(watchdog.high):.3g} or more in steps {self.went_wrong} to "
            f"{self.state.global_step + 1}.\n"
            f"The run was stopped, after {self.slowed} returns to an earlier state.\n"
            f"Fix: try a third of the learning rate ({self.rate_tried / 3:.1g}), or more warmup, "
            "with --overwrite; watchdog=false trains on all the same."
        )

    def _rotate(self, folder: Path) -> None:
        if self.watchdog is None or not self.watchdog.high:
            super()._rotate(folder)

    def _kept(self, folder: Path, steps: Sequence[int]) -> set[int | None]:
        """Keep what could be gone back to, and the state that was the best one there."""
        kept = super()._kept(folder, steps)
        if self.watchdog is None or len(steps) < 2:
            return kept
        before = steps[-2]
        return kept | {before, read_state(folder / f"checkpoint-{before}").best_global_step}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._step_loss = 0.0
        if checkpoint is None or not self.slowed:
            return
        scheduler, factor = self.lr_scheduler, SLOWER**self.slowed
        scheduler.base_lrs = [rate * factor for rate in self.rates]
        shapes = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        for group, base, shape in zip(
            self.optimizer.param_groups, scheduler.base_lrs, shapes, strict=True
        ):
            group.update(initial_lr=base, lr=base * shape)


def rolled_back(trainer: Guarded, error: DivergedError) -> Rollback:
    """Return how to go on after `error`, or raise it where that was tried before or cannot be."""
    if trainer.watchdog is None or trainer.slowed >= MOST:
        raise error
    good = trainer.good_checkpoint()
    if good is None:
        raise error
    why = str(error).split("\n")[0]
    return Rollback(trainer.went_wrong, step_of(good), SLOWER ** (trainer.slowed + 1), why)
