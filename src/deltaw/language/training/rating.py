"""Kahneman-Tversky optimisation through `trl.KTOTrainer`: from answers that are good or bad.

The divergence from the reference, above which an answer counts as gained, is taken from prompts
with the answers of others in their batch. What the reference says of these is computed before
training too, so what is in a batch stays; the order of batches is new in every epoch.

Source: arXiv 2402.01306.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from deltaw.errors import ConfigError, DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.samples import Preference, Rated
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.memory.weighing import Weigh, weigh
from deltaw.language.training.judging import JudgedJob, JudgedTrainer, prepare_judged
from deltaw.language.training.ratings import Ratings, unpaired
from deltaw.language.training.ratings import encode as encode_ratings
from deltaw.train.batches import SteadyBatches
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.loop import arguments
from deltaw.train.recipe import Recipe

BALANCE = 4 / 3
"""How much more all good answers may weigh than all bad ones."""


class RatingTrainer(JudgedTrainer, KTOTrainer):  # type: ignore[misc]
    """`trl.KTOTrainer` by a recipe, over rated answers whose reference is known."""

    def order(self) -> SteadyBatches:
        """Return what orders the batches of every epoch."""
        return SteadyBatches(
            self._lengths(),
            self.recipe.batch_size,
            self.recipe.seed,
            bucketed=False,
            longest_first=self.longest_first,
        )

    def _lengths(self) -> list[int]:
        columns = [self.train_dataset[name] for name in ("prompt_ids", "completion_ids")]
        return [len(prompt) + len(answer) for prompt, answer in zip(*columns, strict=True)]


@dataclass(frozen=True)
class RatingJob(JudgedJob):
    """Prompts with an answer each that is good or bad."""

    @property
    def counted(self) -> tuple[str, str]:
        """The name of the judgements and how many there are, in words."""
        good, bad = (len(side) for side in self.train.judged.sides().values())
        return "answers", f"{counted(self.rows, 'answer')}, {good:,} good and {bad:,} bad"

    def build(self, folder: Path, metric: str | None) -> JudgedTrainer:
        """Return TRL's trainer for these answers; `metric` names the validation score."""
        args = arguments(KTOConfig, self.recipe, folder, self.plan, metric)
        args.beta = self.recipe.pref_beta
        args.desirable_weight = self.recipe.kto_chosen_weight
        args.undesirable_weight = self.recipe.kto_rejected_weight
        collator = DataCollatorForUnpairedPreference(self.padding.pad)
        return RatingTrainer(**self.parts(args), data_collator=collator)


def prepare(recipe: Recipe, console: Console, *, weigh: Weigh = weigh) -> RatingJob:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `weigh` says what memory it takes, before any weight is read.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    if recipe.batch_size == 1:
        raise ConfigError(
            "batch_size=1: task=kto compares each answer with what the model says of other answers "
            "in its batch.\nFix: give 2 or more; gradient_accumulation may be smaller instead."
        )
    job = prepare_judged(recipe, console, _encode, RatingJob, weigh)
    good, bad = (len(side) for side in job.train.judged.sides().values())
    return replace(job, warnings=(*job.warnings, *unbalanced(recipe, good, bad)))


def unbalanced(recipe: Recipe, good: int, bad: int) -> list[str]:
    """Return a warning where good or bad answers weigh too much.

    1 <= λ_D n_D / (λ_U n_U) <= 4/3. Source: arXiv 2402.01306, section 4.2.
    """
    weights = recipe.kto_chosen_weight, recipe.kto_rejected_weight
    ratio = weights[0] * good / (weights[1] * bad)
    if 1 - 1e-6 <= ratio <= BALANCE + 1e-6:
        return []
    fixes = {
        "kto_chosen_weight": (weights[0] / ratio, weights[0] / ratio * BALANCE),
        "kto_rejected_weight": (weights[1] * ratio / BALANCE, weights[1] * ratio),
    }
    key = "kto_chosen_weight" if ratio < 1 else "kto_rejected_weight"
    low, high = fixes[key]
    return [
        f"{good:,} good and {bad:,} bad answers with weights {weights[0]:g} and {weights[1]:g}: "
        f"all good ones together weigh {ratio:.2f} times as much as all bad ones, and 1 to 1.33 "
        f"is advised (arXiv 2402.01306).\nFix: {key} between {low:.3g} and {high:.3g}"
    ]


def _encode(encoder: Encoder, samples: Sequence[Any], corpus: Corpus) -> Ratings:
    if samples and all(isinstance(sample, Preference) for sample in samples):
        samples = unpaired(samples)
    if not all(isinstance(sample, Rated) for sample in samples):
        raise DataError(
            f"{corpus.origins[0].schema.reasons}\ntask=kto learns from answers called good or bad."
            "\nFix: name the column that says so (columns.kto_tag), or leave task out."
        )
    return encode_ratings(encoder, samples)
