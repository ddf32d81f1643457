"""Answers with a judgement, as tokens: what training and scores by a reference ask of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deltaw.errors import ConfigError
from deltaw.language.data.samples import Completion, Conversation, Message, Preference, Rated, Turns
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Encoder, Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.train.data.rows import Skip
from deltaw.train.metrics import Score
from deltaw.train.recipe import Recipe

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Judged(ABC):
    """Judged answers; `skipped` is what was left out, `cut` counts answers that were too long.

    `unsaid` counts answers to something that the template leaves out.
    """

    skipped: list[Skip] = field(default_factory=list)
    cut: int = 0
    unsaid: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return how many judgements there are."""

    @abstractmethod
    def sides(self) -> Mapping[str, Sequence[Row]]:
        """Return the answers by what they are called, the better ones first."""

    def better(self) -> Sequence[Row]:
        """Return the better, or the good, answers."""
        return next(iter(self.sides().values()))

    def lengths(self) -> list[int]:
        """Return how many tokens the longest answer of each judgement has, with its prompt."""
        return [len(row.input_ids) for rows in self.sides().values() for row in rows]

    @abstractmethod
    def log_p(self, model: nn.Module, padding: Padding) -> Floats:
        """Return what a model says of each judgement, (judgements, 2)."""

    @abstractmethod
    def score(self, found: Floats, reference: Floats, recipe: Recipe) -> Score:
        """Return the scores of a model that says `found` where the reference says `reference`."""

    @abstractmethod
    def as_data(self, reference: Floats) -> dict[str, Any]:
        """Return the columns that TRL's collator reads."""

    def refers(self, recipe: Recipe) -> bool:
        """Tell whether a recipe compares what a model says with what a reference does."""
        return True

    def batched(self, recipe: Recipe) -> "Judged":
        """Return the judgements as a recipe trains on them; raise if it cannot."""
        return self


@dataclass(frozen=True, slots=True)
class Known:
    """Judged answers, and what the reference says of them, (judgements, 2); zeros without one."""

    judged: Judged
    reference: Floats

    def score(self, model: nn.Module, padding: Padding, recipe: Recipe) -> Score:
        """Return how the model stands to the reference on these answers."""
        return self.judged.score(self.judged.log_p(model, padding), self.reference, recipe)


def whole(sample: Preference | Rated, answer: Turns) -> Conversation | Completion:
    """Return the prompt of a sample with an answer, whose last turn is what is judged."""
    prompt = sample.prompt
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(prompt, answer, sample.file, sample.line)
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    after = (Message("assistant", answer),) if isinstance(answer, str) else answer
    last = replace(after[-1], trained=True)
    return Conversation((*before, *after[:-1], last), sample.file, sample.line, sample.tools)


def judging(encoder: Encoder) -> Encoder:
    """Return the encoder of whole answers, of which the last is judged.

    Raises:
        ConfigError: where long answers are to be split.
    """
    if encoder.too_long == "split":
        raise ConfigError(
            "too_long=split: an answer is judged as a whole, so it cannot become several rows.\n"
            "Fix: use truncate, drop or raise."
        )
    return replace(encoder, learnt="last")


def begin(row: Row) -> int:
    """Return where the answer of a row begins."""
    return next(place for place, label in enumerate(row.labels) if label != MASKED)


def ended(row: Row) -> Row:
    """Return a row without what follows its answer."""
    end = max(place for place, label in enumerate(row.labels) if label != MASKED) + 1
    start = begin(row)
    labels = [MASKED] * start + row.input_ids[start:end]
    return Row(row.input_ids[:end], labels, row.sample)
