"""What a metric counts row by row, so that one formula serves rows, corpus and replicas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Answers = Sequence[str]
References = Sequence[Sequence[str]]
"""For every row one text or several; an answer is as good as the references let it be."""


@dataclass(frozen=True, slots=True)
class Tally:
    """`counts`, (rows, k), are summed over rows; `score` makes (..., k) into scores (...)."""

    counts: Floats
    score: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The score of all rows together."""
        return float(self.score(self.counts.sum(0)))


def mean_of(values: Sequence[float]) -> Tally:
    """Return the tally of a metric whose score is the mean over rows."""
    return Tally(
        np.array([(value, 1.0) for value in values]), lambda sums: sums[..., 0] / sums[..., 1]
    )


def each(one: Callable[[list[float]], float]) -> Callable[[Floats], Floats]:
    """Return the formula `one` of k sums for arrays (..., k)."""
    return lambda sums: np.apply_along_axis(lambda row: one(row.tolist()), -1, sums)
