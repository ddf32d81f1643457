"""Seeded, stratified choices of rows; rows with the same text always stay together."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from deltaw.train.data.items import Item

Key = tuple[str, str]


def hold_out(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return (kept, held out), about `share` of the distinct texts of every class held out.

    A class with two distinct texts or more has at least one in each part; a class with one stays
    in the first, whatever other labels that text has. Numbers are one class. Both parts keep the
    order of `items`.
    """
    generator = np.random.default_rng(seed)
    held: set[Key] = set()
    for keys in _strata(items):
        count = min(len(keys) - 1, max(1, round(share * len(keys)))) if share else 0
        held.update(keys[index] for index in generator.permutation(len(keys))[:count])
    trained = {_stratum(item) for item in items if item.key not in held}
    for item in items:
        if _stratum(item) not in trained:
            held.discard(item.key)
            trained.add(_stratum(item))
    kept = [item for item in items if item.key not in held]
    return kept, [item for item in items if item.key in held]


def sample(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Return `count` of `items` in their order, every class in proportion (largest remainders).

    As long as `count` allows it every class has at least one.
    """
    if count >= len(items):
        return list(items)
    generator = np.random.default_rng(seed)
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        places[_stratum(item)].append(place)
    strata = list(places.values())
    exact = np.array([len(stratum) for stratum in strata]) * count / len(items)
    quota = np.floor(exact).astype(int)
    largest = np.argsort(quota - exact, kind="stable")[: count - quota.sum()]
    quota[largest] += 1
    for empty in np.flatnonzero(quota == 0):
        quota[quota.argmax()] -= 1
        quota[empty] += 1
    chosen = [
        stratum[index]
        for stratum, size in zip(strata, quota, strict=True)
        for index in generator.permutation(len(stratum))[:size]
    ]
    return [items[place] for place in sorted(chosen)]


def _stratum(item: Item) -> str:
    return item.label if isinstance(item.label, str) else ""


def _strata(items: Sequence[Item]) -> list[list[Key]]:
    """Return the distinct texts of each class; a text with several labels counts for its first."""
    first: dict[Key, str] = {}
    for item in items:
        first.setdefault(item.key, _stratum(item))
    strata: dict[str, list[Key]] = defaultdict(list)
    for key, stratum in first.items():
        strata[stratum].append(key)
    return list(strata.values())
