"""The first steps of a run, timed and thrown away: how long all of them will take."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from deltaw.train.loop import Pace, RecipeTrainer
from deltaw.train.progress import ProgressBar, duration

STEPS = 3


@dataclass(frozen=True, slots=True)
class Probed:
    """What each of the first steps had: loss, seconds, tokens; `total` is of all steps.

    With `longest_first` the longest batch was one of them.
    """

    losses: Sequence[float]
    seconds: Sequence[float]
    tokens: Sequence[int]
    total: float
    longest_first: bool

    @property
    def estimate(self) -> float:
        """Seconds of the whole run at the pace of the steps after the first, which is a start."""
        later = slice(1, None) if len(self.seconds) > 1 else slice(None)
        return self.total * sum(self.seconds[later]) / sum(self.tokens[later])

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the whole run at the pace of the fastest step, and of the slowest."""
        rates = [s / t for s, t in zip(self.seconds, self.tokens, strict=True)]
        return self.total * min(rates), self.total * max(rates)

    def __str__(self) -> str:
        low, high = map(duration, self.spread)
        steps = ", ".join(
            f"{tokens:,} in {seconds:.2g} s"
            for tokens, seconds in zip(self.tokens, self.seconds, strict=True)
        )
        return (
            f"about {duration(self.estimate)}, between {low} and {high}; evaluations come on top\n"
            f"tokens of the first steps{', longest batch first' * self.longest_first}: {steps}"
        )


class First(Pace):
    """Times the first steps, notes their losses, and ends training after them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and training after the last of the steps."""
        super().on_step_end(args, state, control, **kwargs)
        if len(self.seconds) >= self.steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def probe(trainer: RecipeTrainer) -> Probed:
    """Make the first steps of a run, in which the trainer's model changes; write nothing.

    Raises:
        DivergedError: if a loss or gradient is NaN or Inf.
    """
    args, recipe = trainer.args, trainer.recipe
    args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    args.logging_steps = 1
    trainer.remove_callback(ProgressBar)
    first = First(min(STEPS, args.max_steps))
    trainer.add_callback(first)
    transformers.set_seed(recipe.seed)
    trainer.train()
    batches = trainer.padded()
    size = recipe.gradient_accumulation
    steps = [sum(batches[at : at + size]) for at in range(0, len(batches), size)]
    made = [steps[number % len(steps)] for number in range(len(first.seconds))]
    total = args.max_steps * sum(steps) / len(steps)
    return Probed(first.losses, first.seconds, made, total, trainer.longest_first)


def most_memory() -> int:
    """Return the most bytes that this process has held so far, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
