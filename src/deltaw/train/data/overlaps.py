"""Texts that occur more than once: leaks between parts, contradictions, repetitions."""

from collections import defaultdict
from collections.abc import Sequence

from deltaw.errors import DataError, raise_all
from deltaw.train.data.examples import Example
from deltaw.train.data.items import Item
from deltaw.train.data.rows import Skip
from deltaw.train.data.wording import counted, some
from deltaw.train.escape import printable


def leaks(train: Sequence[Item], held_out: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Return (training item, held-out item) for every training item whose text is held out too."""
    held = {item.key: item for item in reversed(held_out)}
    return [(item, held[item.key]) for item in train if item.key in held]


def without_leaks(
    train: Sequence[Item], held_out: Sequence[Item], drop: bool
) -> tuple[list[Item], list[Skip]]:
    """Return the training items whose text is not held out, and the others as skipped rows.

    Raises `DataError` naming the others unless `drop`; held-out items always stay.
    """
    found = leaks(train, held_out)
    if not drop:
        raise_all(
            DataError,
            f"held out too, so evaluation would flatter: {counted(len(found), 'training row')}",
            [
                f'{item.place} "{printable(item.text, 40)}" is also {other.place}'
                for item, other in found
            ],
            "remove them, or drop them from the training part with allow_leakage=true.",
        )
    leaked = {item.key for item, _ in found}
    skips = [Skip(item.file, item.line, f"held out too: {other.place}") for item, other in found]
    return [item for item in train if item.key not in leaked], skips


def count_known(examples: Sequence[Example], known: Sequence[Example]) -> int:
    """Return how many of `examples` have a text that is among `known` too."""
    keys = {_key(example) for example in known}
    return sum(_key(example) in keys for example in examples)


def _key(example: Example) -> tuple[str, str]:
    return example.text.strip(), (example.pair or "").strip()


def repetition_warnings(train: Sequence[Item]) -> list[str]:
    """Return warnings about texts with several labels and about rows that repeat earlier ones."""
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in train:
        groups[item.key].append(item)
    repeated = [group for group in groups.values() if len(group) > 1]
    conflicts, copies = [], []
    for group in repeated:
        by_label = {item.label: item for item in reversed(group)}
        if len(by_label) > 1:
            conflicts.append(sorted(by_label.values(), key=lambda item: item.line))
        first: dict[str | float | None, Item] = {}
        copies += [
            (item, first[item.label])
            for item in group
            if first.setdefault(item.label, item) is not item
        ]
    warnings = []
    if conflicts:
        warnings.append(
            f"{counted(len(conflicts), 'text')} with different labels, all kept: "
            + some([_contradiction(group) for group in conflicts])
        )
    if copies:
        warnings.append(
            f"{counted(len(copies), 'repeated training row')}, all kept: "
            + some([f"{item.place} repeats {earlier.place}" for item, earlier in copies])
        )
    return warnings


def _contradiction(group: Sequence[Item]) -> str:
    labels = ", ".join(f'"{printable(str(item.label), 40)}" at {item.place}' for item in group)
    return f'"{printable(group[0].text, 40)}" is {labels}'
