"""The table of parameters: what is trained, and how much of the model that is."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from deltaw.layer import AdaptedLayer
from deltaw.planning import shorten


@dataclass(frozen=True)
class Row:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    count: int


@dataclass(frozen=True)
class Summary:
    """All parameters of a model; `str(summary)` is the table a person reads.

    A trained copy stands in for the frozen original, which is not counted beside it.
    """

    rows: tuple[Row, ...]
    adapted: tuple[str, ...]

    @property
    def total(self) -> int:
        """Return how many parameters the model has."""
        return sum(row.count for row in self.rows)

    @property
    def trainable(self) -> int:
        """Return how many of them are trained."""
        return sum(row.count for row in self.rows if row.trainable)

    @property
    def percentage(self) -> float:
        """Return `100 trainable / total`."""
        return 100 * self.trainable / max(self.total, 1)

    def line(self) -> str:
        """Return the totals in one line."""
        return f"{self.trainable:,} of {self.total:,} parameters trained ({self.percentage:.4f}%)"

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [9])
        lines = [f"{'parameter':<{width}}  {'shape':<16}  trainable  {'count':>12}"]
        lines += [
            f"{row.name:<{width}}  {'x'.join(map(str, row.shape)):<16}  {row.trainable:>9d}"
            f"  {row.count:>12,}"
            for row in self.rows
        ]
        adapted = shorten_groups(self.adapted)
        return "\n".join([*lines, f"adapted: {', '.join(adapted) or 'nothing'}", self.line()])


def summary(model: nn.Module) -> Summary:
    """Return name, shape, trainable and count of every parameter, and which layers are adapted."""
    replaced = set(_replaced(model))
    rows = tuple(
        Row(name, tuple(p.shape), p.requires_grad, p.numel())
        for name, p in model.named_parameters()
        if name not in replaced
    )
    adapted = tuple(
        path
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer)
        and any(not part.replaces for name in layer.adapter for part in layer.parts(name).values())
    )
    return Summary(rows, adapted)


def shorten_groups(paths: tuple[str, ...]) -> list[str]:
    """Return one text per set of paths that differ in their numbers alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        groups.setdefault(tuple("*" if p.isdigit() else p for p in path.split(".")), []).append(
            path
        )
    return [shorten(group) for group in groups.values()]


def _replaced(model: nn.Module) -> Iterator[str]:
    """Yield the names of the frozen originals that a trained copy stands in for."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            for name in layer.adapter:
                parts = layer.parts(name).items()
                yield from (f"{path}.{slot}" for slot, part in parts if part.replaces)
