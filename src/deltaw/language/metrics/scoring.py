"""All metrics of generated answers, with intervals from resampled questions."""

from collections.abc import Mapping

import numpy as np

from deltaw.language.metrics.bleu import bleu
from deltaw.language.metrics.chrf import chrf
from deltaw.language.metrics.exact import exact_match
from deltaw.language.metrics.nist import nist
from deltaw.language.metrics.rouge import rouge_l
from deltaw.language.metrics.tally import Answers, Floats, References, Tally
from deltaw.language.metrics.words import Words
from deltaw.language.scores import Interval, interval, resampled
from deltaw.train.metrics import Score

METRICS = ("exact_match", "bleu", "nist", "rouge_l", "chrf")
Tallies = Mapping[str, Tally]


def tallies(answers: Answers, references: References, words: Words) -> dict[str, Tally]:
    """Return what every metric counts, by its name in a recipe."""
    return {
        "exact_match": exact_match(answers, references),
        "bleu": bleu(answers, references, words),
        "nist": nist(answers, references, words),
        "rouge_l": rouge_l(answers, references),
        "chrf": chrf(answers, references),
    }


def score(primary: str, found: Tallies, seed: int = 0) -> Score:
    """Return the scores with 95% intervals of resampled questions."""
    values = {name: tally.value for name, tally in found.items()}
    intervals = {name: interval(drawn) for name, drawn in _replicas(found, seed).items()}
    return Score(primary, values, intervals, len(next(iter(found.values())).counts))


def beside(loss: Score, wanted: str | None, found: Tallies) -> Score:
    """Return the scores of answers beside the loss on the same rows.

    The first of them is the `wanted` one, or the loss where answers have no such score.
    """
    primary = wanted if wanted in found else loss.primary
    said = score(primary, found)
    return Score(primary, loss.values | said.values, loss.intervals | said.intervals, loss.rows)


def differences(
    before: Tallies, after: Tallies, seed: int = 0
) -> dict[str, tuple[float, Interval]]:
    """Return how much each score rose, with its 95% interval; both are resampled together."""
    one, other = _replicas(before, seed), _replicas(after, seed)
    return {
        name: (after[name].value - before[name].value, interval(other[name] - one[name]))
        for name in after
    }


def _replicas(found: Tallies, seed: int) -> dict[str, Floats]:
    """Return the scores of questions drawn with replacement, the same ones for every metric."""
    sums = resampled(np.concatenate([tally.counts for tally in found.values()], 1), seed)
    ends = np.cumsum([tally.counts.shape[1] for tally in found.values()])[:-1]
    parts = np.split(sums, ends, 1)
    return {
        name: tally.score(part) for (name, tally), part in zip(found.items(), parts, strict=True)
    }
