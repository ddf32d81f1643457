"""The clean form of a data row: what a model is trained on, evaluated on, or asked about."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.train.data.items import Item


@dataclass(frozen=True, slots=True)
class Example:
    """A text or a pair, with its class index or number (None when only predictions are wanted)."""

    text: str
    pair: str | None
    label: int | float | None
    file: str
    line: int


def to_examples(items: Sequence[Item], labels: Sequence[str]) -> tuple[Example, ...]:
    """Return `items` as examples, class names replaced by their index in `labels`."""
    index: dict[str | float | None, int] = {name: place for place, name in enumerate(labels)}
    return tuple(
        Example(
            item.text,
            item.pair,
            index[item.label] if isinstance(item.label, str) else item.label,
            item.file,
            item.line,
        )
        for item in items
    )


def distribution(examples: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    """Return how many examples every class has, in the order of `labels`."""
    counts = Counter(example.label for example in examples)
    return {name: counts[index] for index, name in enumerate(labels)}
