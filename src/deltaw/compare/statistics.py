"""What the scores of several seeds prove: means, their errors, ties, and a paired test."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy import stats

TIE = 2.0
"""Differences within so many standard errors are ties."""
LEVEL = 0.05

Scores = Mapping[int, float]
"""The scores of one method by seed."""


@dataclass(frozen=True)
class Mean:
    """A mean over `count` seeds and its standard error, `None` for fewer than two."""

    value: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over the seeds that both have, its error and p-value."""

    mean: float
    error: float | None
    p: float | None

    @property
    def is_tie(self) -> bool:
        """Whether it lies within two standard errors; of a single seed they are not known."""
        return self.error is not None and abs(self.mean) <= TIE * self.error


def mean(values: Sequence[float]) -> Mean:
    """Return the mean and s / sqrt(n), with s the sample's standard deviation."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error, len(values))


def paired(first: Scores, second: Scores) -> Difference | None:
    """Compare two methods seed by seed, or return `None` if they share no seed.

    The p-value is that of the two-sided paired t-test, and of the sign test where all seeds differ
    by exactly the same, as scores that move in steps may.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    found = mean([first[seed] - second[seed] for seed in shared])
    if found.error is None:
        return Difference(found.value, None, None)
    if found.error < 1e-12:
        signs = 2 * 0.5**found.count
        return Difference(found.value, 0.0, 1.0 if abs(found.value) < 1e-12 else signs)
    t = abs(found.value) / found.error
    return Difference(found.value, found.error, float(2 * stats.t.sf(t, found.count - 1)))


def holm(values: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Return p-values corrected for their number, so that LEVEL bounds any false claim.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected = {}
    highest = 0.0
    for index, (pair, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, value * (len(values) - index)))
        corrected[pair] = highest
    return corrected


def proven(scores: Mapping[str, Scores]) -> list[tuple[str, str, float]]:
    """Return (better, worse, corrected p) of all pairs that the paired test tells apart."""
    differences = {
        (a, b): found
        for a, b in combinations(scores, 2)
        if (found := paired(scores[a], scores[b])) is not None
    }
    tested = {pair: found.p for pair, found in differences.items() if found.p is not None}
    return [
        (*(pair if differences[pair].mean > 0 else pair[::-1]), p)
        for pair, p in holm(tested).items()
        if p < LEVEL
    ]
