"""Preferences as pairs of token rows, and how much a model prefers the better answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deltaw.language.data.samples import Completion, Conversation, Message, Preference, Turns
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import MASKED, Encoder, Row
from deltaw.language.scores import measured
from deltaw.train.data.rows import Skip
from deltaw.train.metrics import REPLICAS, Score

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a better and a worse answer; the answers' tokens are those learnt."""

    chosen: Row
    rejected: Row

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answers."""
        return self.chosen.input_ids[: _begin(self.chosen)]

    def as_data(self) -> dict[str, list[int]]:
        """Return the columns that TRL's collator reads."""
        begin = _begin(self.chosen)
        return {
            "prompt_ids": self.prompt,
            "chosen_ids": self.chosen.input_ids[begin:],
            "rejected_ids": self.rejected.input_ids[begin:],
        }


@dataclass(slots=True)
class Pairs:
    """What preferences became, and what was left out."""

    pairs: list[Pair] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    cut: int = 0


def encode(encoder: Encoder, samples: Sequence[Preference]) -> Pairs:
    """Return the pairs of all preferences whose answers fit behind one prompt.

    Raises:
        DataError: listing the samples that the template refuses or leaves without an end.
    """
    found = Pairs()
    single = replace(encoder, learnt="last", too_long=None)
    rows: dict[int, Row] = {}
    sides = [(_whole(s, s.chosen), _whole(s, s.rejected)) for s in samples]
    encoded = single.encode([side for pair in sides for side in pair])
    found.cut = encoded.cut
    rows = {id(row.sample): row for row in encoded.rows}
    for sample, pair in zip(samples, sides, strict=True):
        both = [rows.get(id(side)) for side in pair]
        where = (sample.file, sample.line)
        if both[0] is None or both[1] is None:
            found.skipped.append(Skip(*where, f"more than {encoder.max_length:,} tokens"))
            continue
        chosen, rejected = (_ended(row) for row in both if row is not None)
        begin = _begin(chosen)
        if chosen.input_ids[:begin] != rejected.input_ids[: _begin(rejected)]:
            found.skipped.append(Skip(*where, "the answers' first tokens reach into the prompt"))
        else:
            found.pairs.append(Pair(chosen, rejected))
    return found


def preferred(model: nn.Module, pairs: Sequence[Pair], padding: Padding) -> Floats:
    """Return log p of the better and of the worse answer of each pair, (pairs, 2)."""
    sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    return np.stack([-measured(model, rows, padding)[:, 0] for rows in sides], -1)


def score(found: Floats, reference: Floats, beta: float, seed: int = 0) -> Score:
    """Return the loss of DPO and how often the better answer gained more than the worse.

        m = β ((log p_c - log p_ref,c) - (log p_r - log p_ref,r)),  L = mean(log(1 + exp(-m)))

    `accuracy` is the share of m > 0 (a half for m = 0), `prefers` that of log p_c > log p_r.
    Intervals are 95% of resampled pairs.

    Source: arXiv 2305.18290, equation 7.
    """
    gained = found - reference
    margin = beta * (gained[:, 0] - gained[:, 1])
    each = {
        "loss": np.logaddexp(0, -margin),
        "accuracy": 0.5 * (1 + np.sign(margin)),
        "prefers": 0.5 * (1 + np.sign(found[:, 0] - found[:, 1])),
    }
    generator = np.random.default_rng(seed)
    draws = [generator.integers(0, len(found), len(found)) for _ in range(REPLICAS)]
    intervals = {}
    for name, values in each.items():
        low, high = np.quantile([values[draw].mean() for draw in draws], (0.025, 0.975))
        intervals[name] = (float(low), float(high))
    return Score("loss", {n: float(v.mean()) for n, v in each.items()}, intervals, len(found))


def _whole(sample: Preference, answer: Turns) -> Conversation | Completion:
    """Return the prompt with one of its answers."""
    if isinstance(sample.prompt, str) and isinstance(answer, str):
        return Completion(sample.prompt, answer, sample.file, sample.line)
    prompt = sample.prompt
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    after = (Message("assistant", answer),) if isinstance(answer, str) else answer
    return Conversation((*before, *after), sample.file, sample.line, sample.tools)


def _begin(row: Row) -> int:
    return next(place for place, label in enumerate(row.labels) if label != MASKED)


def _ended(row: Row) -> Row:
    """Return a row without what follows its answer."""
    end = max(place for place, label in enumerate(row.labels) if label != MASKED) + 1
    begin = _begin(row)
    labels = [MASKED] * begin + row.input_ids[begin:end]
    return Row(row.input_ids[:end], labels, row.sample)
