"""Which runs are to be done: rates by successive halving with one seed, the best with all seeds.

Of n rates all are tried for a short run; the better half goes on to runs of twice the length, and
so on until one is left, which is trained in full length with every seed. Each run is a run of its
own, with its own decay of the rate. Three rates: three quarters-long runs, two of half the length.

Source: successive halving, arXiv 1502.07943, here with whole runs instead of continued ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One run: a method at a rate, for a share of the steps, with a seed."""

    method: str
    rate: float
    share: float
    seed: int

    @property
    def key(self) -> str:
        """Its name among the results."""
        return f"{self.method} | lr {self.rate!r} | share {self.share:g} | seed {self.seed}"


DIVERGED = (-math.inf, -math.inf)
Score = Callable[[Trial], tuple[float, float] | None]
"""Validation score and, for equal ones, negative loss of a trial; `None` until it has been run."""


def rungs(count: int) -> list[tuple[int, float]]:
    """Return (number of rates, share of the steps) of each round before the full runs."""
    halvings = math.ceil(math.log2(count)) if count > 1 else 0
    return [(math.ceil(count / 2**i), 0.5 ** (halvings - i)) for i in range(halvings)]


def planned(rates: int, seeds: int) -> float:
    """Return how many full runs a method takes, shorter ones counted by their share."""
    return sum(count * share for count, share in rungs(rates)) + seeds


def count(rates: int, seeds: int) -> int:
    """Return how many runs a method takes."""
    return sum(count for count, _ in rungs(rates)) + seeds


@dataclass(frozen=True)
class Standing:
    """How far the runs of a method are."""

    due: list[Trial]
    """What can be run now; nothing when the method is done."""
    done: list[Trial]
    """What was run, round by round."""
    final: list[Trial]
    """The full runs at the best rate; none before it is known, or if every rate diverged."""


def standing(method: str, rates: Sequence[float], seeds: Sequence[int], score: Score) -> Standing:
    """Return how far a method is, from the scores of the trials run so far."""
    left = sorted(rates)
    done: list[Trial] = []
    for _, share in rungs(len(rates)):
        trials = [Trial(method, rate, share, seeds[0]) for rate in left]
        scores = {trial: score(trial) for trial in trials}
        found = {trial: value for trial, value in scores.items() if value is not None}
        done += found
        if len(found) < len(trials):
            return Standing([trial for trial in trials if trial not in found], done, [])
        ranked = sorted(trials, key=lambda trial: found[trial], reverse=True)
        half = ranked[: math.ceil(len(ranked) / 2)]
        left = sorted(trial.rate for trial in half if found[trial] != DIVERGED)
    final = [Trial(method, rate, 1.0, seed) for rate in left[:1] for seed in seeds]
    due = [trial for trial in final if score(trial) is None]
    return Standing(due, done + [trial for trial in final if trial not in due], final)
