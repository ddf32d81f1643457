"""The order in which several data sets are gone through.

Source: the rules and names of `mix_strategy` are LLaMA-Factory's, which are those of
`datasets.interleave_datasets`.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Literal, get_args

import numpy as np

from deltaw.errors import ConfigError, raise_all

Strategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
Pick = tuple[int, int]
"""Which data set, and which of its samples."""


def mix(
    sizes: Sequence[int], strategy: Strategy, probs: Sequence[float] | None, seed: int
) -> list[Pick]:
    """Return which sample comes when, for data sets of `sizes` (at least 1 each).

    `concat` goes through one after the other. The others take turns, or draw the next data set
    with probability p_i = probs_i / Σ probs: `interleave_under` until the first is exhausted,
    `interleave_over` until all are (starting again those that end before), `interleave_once` until
    every sample was taken once.
    """
    if strategy == "concat":
        return [(source, index) for source, size in enumerate(sizes) for index in range(size)]
    picks: list[Pick] = []
    taken, exhausted = [0] * len(sizes), [False] * len(sizes)
    enough = any if strategy == "interleave_under" else all
    for turns in _rounds(len(sizes), probs, seed):
        if enough(exhausted):
            break
        for source in turns:
            if strategy == "interleave_once" and exhausted[source]:
                continue
            picks.append((source, taken[source]))
            taken[source] = (taken[source] + 1) % sizes[source]
            exhausted[source] |= taken[source] == 0
    return picks


def check_mix(strategy: str, probs: Sequence[float] | None, count: int) -> None:
    """Refuse an unknown strategy, and weights that do not fit `count` data sets."""
    problems = []
    if strategy not in get_args(Strategy):
        problems.append(f"mix_strategy is {strategy!r}, none of {', '.join(get_args(Strategy))}")
    if probs is not None:
        if strategy == "concat":
            problems.append("interleave_probs are given, and mix_strategy is concat")
        if len(probs) != count:
            problems.append(f"{len(probs)} interleave_probs for {count} data sets")
        if not all(0 < prob < float("inf") for prob in probs):
            problems.append("interleave_probs must be positive numbers")
    raise_all(
        ConfigError,
        "the data sets cannot be mixed as asked",
        problems,
        "give one positive weight for each data set, and mix_strategy=interleave_under, "
        "interleave_over or interleave_once.",
    )


def _rounds(count: int, probs: Sequence[float] | None, seed: int) -> Iterator[Sequence[int]]:
    if probs is None:
        yield from repeat(range(count))
        return
    generator = np.random.default_rng(seed)
    share = np.array(probs, dtype=float) / sum(probs)
    while True:
        for source in generator.choice(count, size=1000, p=share):
            yield (int(source),)
