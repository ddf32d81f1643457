"""A run that is ready to start: what is common to every kind of training, and what is not."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaw.train.console import Console
from deltaw.train.continuing import Adapted
from deltaw.train.interrupt import Interrupt
from deltaw.train.loop import RecipeTrainer
from deltaw.train.metrics import Score
from deltaw.train.progress import ProgressBar
from deltaw.train.rates import TrainingPlan
from deltaw.train.recipe import Recipe


@dataclass(frozen=True)
class Job(ABC):
    """Model, rows and choices; the record of `recipe` holds every choice that it left open.

    `rows` counts what is trained on, `held_out_name` says which part scores are from.
    """

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    plan: TrainingPlan
    adapted: Adapted
    warnings: tuple[str, ...]
    held_out_name: str

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows are trained on."""

    @property
    @abstractmethod
    def validated(self) -> bool:
        """Whether there are validation rows."""

    @property
    @abstractmethod
    def tested(self) -> bool:
        """Whether there is a test part beside the validation part."""

    @abstractmethod
    def trainer(self, folder: Path, interrupt: Interrupt, progress: ProgressBar) -> RecipeTrainer:
        """Return the Trainer, its optimiser built."""

    @abstractmethod
    def probe(self, trainer: RecipeTrainer) -> dict[str, Tensor]:
        """Return a few rows on which the adapters are tried."""

    @abstractmethod
    def score(self) -> Score | None:
        """Return the model's score on the held-out rows, if there are any."""

    @abstractmethod
    def show_rows(self, console: Console) -> None:
        """Say how long the rows are."""

    def foresee(self, console: Console) -> None:
        """Say what rows and model together let one expect of the training."""
        if not self.validated:
            console.field(
                "warning",
                "no rows are held out, so nothing tells whether and when the run has learnt "
                "enough.\nFix: validation_share=0.1, or a validation part beside the training part",
            )

    @abstractmethod
    def commands(self, run: str) -> list[str]:
        """Return what to type next; `run` is the folder, quoted."""
