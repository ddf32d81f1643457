"""Preferences as pairs of token rows, and how much a model prefers the better answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from deltaw.language.data.samples import Preference
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Encoder, Row
from deltaw.language.scores import measured
from deltaw.language.training.judged import Floats, Judged, begin, ended, judging, whole
from deltaw.language.training.losses import PairLoss
from deltaw.train.data.rows import Skip
from deltaw.train.metrics import REPLICAS, Score, middle
from deltaw.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a better and a worse answer; the answers' tokens are those learnt."""

    chosen: Row
    rejected: Row

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answers."""
        return self.chosen.input_ids[: begin(self.chosen)]

    def as_data(self) -> dict[str, list[int]]:
        """Return the columns that TRL's collator reads."""
        start = begin(self.chosen)
        return {
            "prompt_ids": self.prompt,
            "chosen_ids": self.chosen.input_ids[start:],
            "rejected_ids": self.rejected.input_ids[start:],
        }


@dataclass(slots=True)
class Pairs(Judged):
    """What preferences became."""

    pairs: list[Pair] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self.pairs)

    def sides(self) -> Mapping[str, Sequence[Row]]:
        """Return the better and the worse answers."""
        return {
            "chosen": [pair.chosen for pair in self.pairs],
            "rejected": [pair.rejected for pair in self.pairs],
        }

    def lengths(self) -> list[int]:
        """Return how many tokens the longer answer of each pair has, with the prompt."""
        return [max(len(p.chosen.input_ids), len(p.rejected.input_ids)) for p in self.pairs]

    def log_p(self, model: nn.Module, padding: Padding) -> Floats:
        """Return log p of the better and of the worse answer of each pair, (pairs, 2)."""
        return preferred(model, self.pairs, padding)

    def refers(self, recipe: Recipe) -> bool:
        """Tell whether the recipe's loss has a reference."""
        return not PairLoss.of(recipe).alone

    def score(self, found: Floats, reference: Floats, recipe: Recipe) -> Score:
        """Return loss, accuracy, margin and preference of a model by the recipe's loss."""
        sizes = np.array([[pair.chosen.learnt, pair.rejected.learnt] for pair in self.pairs])
        return score(found, reference, sizes, PairLoss.of(recipe))

    def as_data(self, reference: Floats) -> dict[str, Any]:
        """Return the columns that TRL's collator of preferences reads."""
        rows = [pair.as_data() for pair in self.pairs]
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        for number, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            columns[name] = reference[:, number].astype("float32")
        return columns


def encode(encoder: Encoder, samples: Sequence[Preference]) -> Pairs:
    """Return the pairs of all preferences whose answers fit behind one prompt.

    Raises:
        ConfigError: where long answers are to be split.
        DataError: listing the samples that the template refuses or leaves without an end, and
            those that are too long where that is an error.
    """
    found = Pairs()
    sides = [(whole(s, s.chosen), whole(s, s.rejected)) for s in samples]
    encoded = judging(encoder).encode([side for pair in sides for side in pair])
    found.cut, found.unsaid = encoded.cut, encoded.unsaid
    rows = {id(row.sample): row for row in encoded.rows}
    reasons = {(skip.file, skip.line): skip.reason for skip in encoded.skipped}
    for sample, pair in zip(samples, sides, strict=True):
        both = [rows.get(id(side)) for side in pair]
        where = (sample.file, sample.line)
        if both[0] is None or both[1] is None:
            found.skipped.append(Skip(*where, reasons[where]))
            continue
        chosen, rejected = (ended(row) for row in both if row is not None)
        start = begin(chosen)
        if chosen.input_ids[:start] != rejected.input_ids[: begin(rejected)]:
            found.skipped.append(Skip(*where, "the answers' first tokens reach into the prompt"))
        elif chosen.input_ids == rejected.input_ids:
            found.skipped.append(Skip(*where, "as far as they fit, both answers are the same"))
        else:
            found.pairs.append(Pair(chosen, rejected))
    return found


def preferred(model: nn.Module, pairs: Sequence[Pair], padding: Padding) -> Floats:
    """Return log p of the better and of the worse answer of each pair, (pairs, 2)."""
    sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    return np.stack([-measured(model, rows, padding)[:, 0] for rows in sides], -1)


def score(found: Floats, reference: Floats, sizes: Floats, loss: PairLoss, seed: int = 0) -> Score:
    """Return the loss and how often, and by how much, the better answer gained more.

        m = β ((log p_c - log p_ref,c) - (log p_r - log p_ref,r))

    or, for losses without a reference, β (log p_c / n_c - log p_r / n_r). `accuracy` is the share
    of m > 0 (a half for m = 0), `margin` the mean of m, `prefers` the share of log p_c > log p_r.
    `sizes` counts the tokens of the answers, (pairs, 2). Intervals are 95% of resampled pairs.

    Source: arXiv 2305.18290, equation 7.
    """
    margin = loss.margins(found, reference, sizes)
    each = {
        "loss": loss(found, reference, sizes),
        "accuracy": 0.5 * (1 + np.sign(margin)),
        "margin": margin,
        "prefers": 0.5 * (1 + np.sign(found[:, 0] - found[:, 1])),
    }
    generator = np.random.default_rng(seed)
    draws = [generator.integers(0, len(found), len(found)) for _ in range(REPLICAS)]
    intervals = {
        name: middle(np.array([values[draw].mean() for draw in draws]))
        for name, values in each.items()
    }
    return Score("loss", {n: float(v.mean()) for n, v in each.items()}, intervals, len(found))
