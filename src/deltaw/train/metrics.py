"""Scores of predictions on held-out rows, each with a 95% confidence interval.

Every metric is one function of arrays whose last axis is summed over, so that the same lines give
the score and its thousand bootstrap replicas. A metric that is undefined (one class only, constant
predictions) is 0: no evidence of skill.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaw.errors import DataError
from deltaw.train.data.detect import Task

Floats = NDArray[np.float64]
Numbers = Sequence[float] | NDArray[Any]
Interval = tuple[float, float]
Z = 1.959963984540054
REPLICAS = 1000
PRIMARY: dict[Task, str] = {"classification": "accuracy", "regression": "pearson"}
# Replicas of a regression are computed in batches of at most this many numbers.
BATCH = 2_000_000


@dataclass(frozen=True, slots=True)
class Score:
    """`values` and 95% `intervals` by metric; `primary` names the one to compare runs by."""

    primary: str
    values: dict[str, float]
    intervals: dict[str, Interval]
    rows: int

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.values[self.primary]

    @property
    def interval(self) -> Interval:
        """The 95% confidence interval of the primary metric."""
        return self.intervals[self.primary]

    def as_data(self) -> dict[str, Any]:
        """Return what a run's files hold of it."""
        intervals = {name: list(pair) for name, pair in self.intervals.items()}
        return {
            "primary": self.primary,
            "values": self.values,
            "intervals": intervals,
            "rows": self.rows,
        }


def measure(task: Task, labels: Numbers, predictions: Numbers) -> dict[str, float]:
    """Return accuracy, macro_f1 and matthews of class indices, or pearson and spearman of numbers.

    Raises `DataError` for no rows, unequal lengths, or predictions that are not finite.
    """
    true, predicted = _checked(labels, predictions)
    if task == "regression":
        return {name: float(metric(true, predicted)) for name, metric in CORRELATIONS.items()}
    cells, counts, codes = _confusion(true, predicted)
    return {name: float(metric(counts, cells, codes)) for name, metric in AGREEMENTS.items()}


def score(task: Task, labels: Numbers, predictions: Numbers, *, seed: int = 0) -> Score:
    """Return what `measure` returns, with intervals: Wilson for accuracy, bootstrap for the rest.

    The bootstrap draws the rows 1,000 times with replacement, seeded, and takes the 2.5% and 97.5%
    quantiles.
    """
    true, predicted = _checked(labels, predictions)
    rows = len(true)
    values = measure(task, true, predicted)
    generator = np.random.default_rng(seed)
    if task == "regression":
        replicas = _resampled(true, predicted, generator)
    else:
        # Drawing rows with replacement is drawing the cells of their confusion matrix.
        cells, counts, codes = _confusion(true, predicted)
        drawn = generator.multinomial(rows, counts / rows, size=REPLICAS).astype(np.float64)
        replicas = {name: metric(drawn, cells, codes) for name, metric in AGREEMENTS.items()}
    intervals = {name: middle(replica) for name, replica in replicas.items()}
    if task == "classification":
        intervals["accuracy"] = wilson(round(values["accuracy"] * rows), rows)
    return Score(PRIMARY[task], values, intervals, rows)


def wilson(right: int, rows: int) -> Interval:
    """Return the 95% score interval of a share of `right` out of `rows`.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    share, spread = right / rows, Z * Z / rows
    centre = share + spread / 2
    half = Z * sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def _checked(labels: Numbers, predictions: Numbers) -> tuple[Floats, Floats]:
    true, predicted = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise DataError(
            f"cannot score labels of shape {true.shape} against predictions of shape "
            f"{predicted.shape}\nFix: give one prediction per label, and at least one."
        )
    if bad := int((~np.isfinite(predicted)).sum()):
        raise DataError(
            f"{bad} of {len(predicted)} predictions are NaN or infinite\n"
            "Fix: the model diverged; go back to an earlier checkpoint or a lower learning rate."
        )
    return true, predicted


def _confusion(true: Floats, predicted: Floats) -> tuple[NDArray[np.int64], Floats, int]:
    """Return the non-empty cells (2, cells) as (true, predicted) codes, their counts, classes."""
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    pairs = codes.reshape(2, -1)
    cells, counts = np.unique(pairs, axis=1, return_counts=True)
    return cells.astype(np.int64), counts.astype(np.float64), len(classes)


def _totals(counts: Floats, of: NDArray[np.int64], classes: int) -> Floats:
    """Sum (..., cells) by class to (..., classes)."""
    totals: Floats = counts @ np.eye(classes)[of]
    return totals


def _accuracy(counts: Floats, cells: NDArray[np.int64], classes: int) -> Floats:
    right = cells[0] == cells[1]
    share: Floats = counts[..., right].sum(-1) / counts.sum(-1)
    return share


def _macro_f1(counts: Floats, cells: NDArray[np.int64], classes: int) -> Floats:
    """Mean over the classes that occur of 2 hits / (true + predicted)."""
    right = cells[0] == cells[1]
    hits = _totals(counts[..., right], cells[0, right], classes)
    seen = _totals(counts, cells[0], classes) + _totals(counts, cells[1], classes)
    mean: Floats = (2 * _ratio(hits, seen)).sum(-1) / (seen > 0).sum(-1)
    return mean


def _matthews(counts: Floats, cells: NDArray[np.int64], classes: int) -> Floats:
    """(n hits - t·p) / sqrt((n² - p·p)(n² - t·t)) with t, p the class totals.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient".
    """
    right = cells[0] == cells[1]
    rows, hits = counts.sum(-1), counts[..., right].sum(-1)
    true, predicted = (_totals(counts, of, classes) for of in cells)
    spread = (rows**2 - (predicted**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return _ratio(rows * hits - (true * predicted).sum(-1), np.sqrt(spread))


def _pearson(true: Floats, predicted: Floats) -> Floats:
    x = true - true.mean(-1, keepdims=True)
    y = predicted - predicted.mean(-1, keepdims=True)
    # Centring a constant leaves rounding noise, which is not a correlation.
    flat = (np.ptp(true, axis=-1) == 0) | (np.ptp(predicted, axis=-1) == 0)
    spread = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return _ratio((x * y).sum(-1), np.where(flat, 0.0, spread))


def _spearman(true: Floats, predicted: Floats) -> Floats:
    return _pearson(ranks(true), ranks(predicted))


def ranks(values: Floats) -> Floats:
    """Return the ranks along the last axis, from 0, ties by the mean of their ranks."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    places = np.broadcast_to(np.arange(values.shape[-1], dtype=np.float64), values.shape)
    new = np.ones(values.shape, dtype=bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    last = np.ones(values.shape, dtype=bool)
    last[..., :-1] = new[..., 1:]
    first_of_run = np.maximum.accumulate(np.where(new, places, 0), axis=-1)
    backwards = np.where(last, places, np.inf)[..., ::-1]
    last_of_run = np.minimum.accumulate(backwards, axis=-1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first_of_run + last_of_run) / 2, axis=-1)
    return ranks


def _ratio(over: Floats, under: Floats) -> Floats:
    """Divide; 0 where the divisor is 0."""
    return np.divide(over, under, out=np.zeros(np.broadcast(over, under).shape), where=under > 0)


AGREEMENTS: dict[str, Callable[[Floats, NDArray[np.int64], int], Floats]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
}
CORRELATIONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "pearson": _pearson,
    "spearman": _spearman,
}


def _resampled(
    true: Floats, predicted: Floats, generator: np.random.Generator
) -> dict[str, Floats]:
    batch = max(1, BATCH // len(true))
    found: dict[str, list[Floats]] = {name: [] for name in CORRELATIONS}
    for start in range(0, REPLICAS, batch):
        size = (min(batch, REPLICAS - start), len(true))
        drawn = generator.integers(len(true), size=size)
        for name, metric in CORRELATIONS.items():
            found[name].append(metric(true[drawn], predicted[drawn]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def middle(replicas: Floats) -> Interval:
    """Return the middle 95% of resampled scores."""
    low, high = np.quantile(replicas, [0.025, 0.975])
    return float(low), float(high)
