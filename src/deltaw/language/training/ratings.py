"""Rated answers as token rows, and how well a model tells the good from the bad."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deltaw.errors import DataError
from deltaw.language.data.samples import Preference, Rated
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Encoder, Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.scores import measured
from deltaw.language.training.judged import Floats, Judged, begin, ended, judging, whole
from deltaw.train.batches import EpochSampler
from deltaw.train.data.rows import Skip
from deltaw.train.metrics import BATCH, REPLICAS, Score, middle, ranks
from deltaw.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with an answer that is good or bad; the answer's tokens are those learnt."""

    row: Row
    good: bool

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answer."""
        return self.row.input_ids[: begin(self.row)]

    @property
    def completion(self) -> list[int]:
        """The tokens of the answer."""
        return self.row.input_ids[begin(self.row) :]

    def instead(self, other: "Answer", room: int) -> Row:
        """Return this prompt with another's answer, as much of it as there is room for."""
        prompt, answer = self.prompt, other.completion
        ids = [*prompt, *answer][:room]
        return Row(ids, [MASKED] * len(prompt) + ids[len(prompt) :], self.row.sample)


@dataclass(slots=True)
class Ratings(Judged):
    """What rated answers became; `size` neighbours lend each other answers, by default all."""

    answers: list[Answer] = field(default_factory=list)
    room: int = 0
    size: int | None = None

    def __len__(self) -> int:
        """Return how many answers there are."""
        return len(self.answers)

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which answers are good, (answers,)."""
        return np.array([answer.good for answer in self.answers], bool)

    def sides(self) -> Mapping[str, Sequence[Row]]:
        """Return the good and the bad answers."""
        return {
            name: [answer.row for answer in self.answers if answer.good == good]
            for name, good in (("good", True), ("bad", False))
        }

    def mismatched(self) -> list[Row]:
        """Return every prompt with the answer before it in its batch, one to another prompt.

        The prompts of a batch then have the batch's answers, in a circle. An answer alone in its
        batch has that of the batch before.
        """
        size = self.size or max(1, len(self))
        batches = [self.answers[at : at + size] for at in range(0, len(self), size)]
        found = []
        for number, batch in enumerate(batches):
            around = batch if len(batch) > 1 else [*batches[number - 1], *batch]
            prompts = [answer.prompt for answer in around]
            for place in range(len(around) - len(batch), len(around)):
                circle = (place - step for step in range(1, len(around)))
                strangers = (at for at in circle if prompts[at] != prompts[place])
                other = around[next(strangers, place - 1)]
                found.append(around[place].instead(other, self.room))
        return found

    def log_p(self, model: nn.Module, padding: Padding) -> Floats:
        """Return log p of each answer, and of the mismatched one to its prompt, (answers, 2)."""
        sides = ([answer.row for answer in self.answers], self.mismatched())
        return np.stack([-measured(model, rows, padding)[:, 0] for rows in sides], -1)

    def score(self, found: Floats, reference: Floats, recipe: Recipe) -> Score:
        """Return loss, ranking and margin of a model by the recipe's weights."""
        weights = recipe.kto_chosen_weight, recipe.kto_rejected_weight
        return score(found - reference, self.good, recipe.pref_beta, weights)

    def as_data(self, reference: Floats) -> dict[str, Any]:
        """Return the columns that TRL's collator of unpaired preferences reads."""
        others = self.mismatched()
        starts = [begin(answer.row) for answer in self.answers]
        return {
            "prompt_ids": [answer.prompt for answer in self.answers],
            "completion_ids": [answer.completion for answer in self.answers],
            "KL_completion_ids": [
                row.input_ids[at:] for row, at in zip(others, starts, strict=True)
            ],
            "label": [answer.good for answer in self.answers],
            "ref_logps": reference[:, 0].astype("float32"),
            "ref_KL_logps": reference[:, 1].astype("float32"),
        }

    def batched(self, recipe: Recipe) -> "Ratings":
        """Return the answers side by side that are in one batch of the recipe's.

        Raises:
            DataError: if all are good, or all bad.
        """
        if len({*self.good.tolist()}) == 1:
            raise DataError(
                f"All {len(self):,} training answers are {'good' if self.good[0] else 'bad'}, and "
                "task=kto learns from good and bad ones.\n"
                "Fix: add rows of the other kind, or learn good ones as they are (task=sft)."
            )
        lengths = [len(answer.row.input_ids) for answer in self.answers]
        order = EpochSampler(
            lengths, recipe.batch_size, recipe.seed, bucketed=recipe.group_by_length
        )
        answers = [self.answers[index] for index in order]
        return replace(self, answers=answers, size=recipe.batch_size)


def unpaired(samples: Sequence[Preference]) -> list[Rated]:
    """Return the better answers as good ones and the worse as bad ones."""
    return [
        Rated(s.prompt, answer, good, s.file, s.line, s.tools)
        for s in samples
        for answer, good in ((s.chosen, True), (s.rejected, False))
    ]


def encode(encoder: Encoder, samples: Sequence[Rated]) -> Ratings:
    """Return the answers that fit behind their prompts.

    Raises:
        ConfigError: where long answers are to be split.
        DataError: listing the samples that the template refuses or leaves without an end, and
            those that are too long where that is an error.
    """
    wholes = [whole(sample, sample.completion) for sample in samples]
    encoded = judging(encoder).encode(wholes)
    rows = {id(row.sample): row for row in encoded.rows}
    reasons = {(skip.file, skip.line): skip.reason for skip in encoded.skipped}
    found = Ratings(cut=encoded.cut, unsaid=encoded.unsaid, room=encoder.max_length)
    for sample, side in zip(samples, wholes, strict=True):
        row = rows.get(id(side))
        if row is None:
            where = (sample.file, sample.line)
            found.skipped.append(Skip(*where, reasons[where]))
        else:
            found.answers.append(Answer(ended(row), sample.good))
    return found


def score(
    gained: Floats,
    good: NDArray[np.bool_],
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
) -> Score:
    """Return the loss of KTO and how well the gains of good answers stand above those of bad ones.

        z = max(0, mean(log p' - log p'_ref))
        L = mean(λ_D P(β (z - g)) of good ones, λ_U P(β (g - z)) of bad ones)

    with P(x) = 1 / (1 + exp(-x)) and the `weights` λ_D, λ_U.
    `gained` has g = log p - log p_ref of every answer, and of a mismatched one, (answers, 2); `kl`
    is z, which is 0 for a single answer. `auc` is the share of pairs of a good and a bad answer in
    which the good one gained more (a half where both gained the same), `margin` is β times the
    difference of their mean gains; both are left out where all answers are of one kind. Intervals
    are 95% of good and bad answers resampled apart.

    Source: arXiv 2402.01306, equations 7 and 8.
    """
    values = _values(gained, good, beta, weights)
    generator = np.random.default_rng(seed)
    places = np.arange(len(gained))
    size = max(1, BATCH // len(gained))
    parts = []
    for start in range(0, REPLICAS, size):
        drawn = np.tile(places, (min(size, REPLICAS - start), 1))
        for side in (good, ~good):
            if side.any():
                drawn[:, side] = generator.choice(places[side], drawn[:, side].shape)
        parts.append(_values(gained[drawn], good, beta, weights))
    intervals = {name: middle(np.concatenate([part[name] for part in parts])) for name in values}
    return Score("loss", {n: float(v) for n, v in values.items()}, intervals, len(gained))


def _values(
    gained: Floats, good: NDArray[np.bool_], beta: float, weights: tuple[float, float]
) -> dict[str, Floats]:
    """Return the scores of gains, (..., answers, 2), as arrays of (...)."""
    own, other = gained[..., 0], gained[..., 1]
    several = len(good) > 1
    baseline = np.maximum(0, other.mean(-1)) if several else np.zeros(own.shape[:-1])
    above = own - baseline[..., None]
    loss = np.where(good, *weights) * np.exp(-np.logaddexp(0, beta * np.where(good, above, -above)))
    found = {"loss": loss.mean(-1), "kl": baseline}
    n, m = int(good.sum()), int((~good).sum())
    if not n or not m:
        return found
    below = ranks(own)[..., good].sum(-1) - n * (n - 1) / 2
    apart = own[..., good].mean(-1) - own[..., ~good].mean(-1)
    return found | {"auc": below / (n * m), "margin": beta * apart}
