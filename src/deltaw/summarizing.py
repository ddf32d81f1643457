"""The table of parameters: what is trained, and how much of the model that is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltaw.adapters.replace import ReplaceAdapter
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.quant import storage_of
from deltaw.walking import walk


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
    rows = tuple(
        Row(name, tuple(shape), p.requires_grad, shape.numel())
        for name, p, shape in _counted(model)
    )
    adapted = tuple(
        path
        for path, layer in walk(model)
        if isinstance(layer, AdaptedLayer)
        and any(not part.replaces for name in layer.adapter for part in layer.parts(name).values())
    )
    return Summary(rows, adapted)


def shorten(paths: Sequence[str]) -> str:
    """Return one line for paths that differ in their numbers, as in `layer.0-11.query (12)`."""
    if len(paths) == 1:
        return paths[0]
    parts = list(zip(*(path.split(".") for path in paths), strict=True))
    merged = []
    for values in parts:
        numbers = sorted({int(v) for v in values if v.isdigit()})
        dense = numbers and numbers == list(range(numbers[0], numbers[-1] + 1))
        if len(set(values)) == 1:
            merged.append(values[0])
        elif dense:
            merged.append(f"{numbers[0]}-{numbers[-1]}")
        else:
            merged.append("{" + ",".join(map(str, numbers)) + "}" if numbers else "*")
    return f"{'.'.join(merged)} ({len(paths)})"


def shorten_groups(paths: tuple[str, ...]) -> list[str]:
    """Return one text per set of paths that differ in their numbers alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        groups.setdefault(tuple("*" if p.isdigit() else p for p in path.split(".")), []).append(
            path
        )
    return [shorten(group) for group in groups.values()]


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Size]]:
    """Yield each parameter once, with its shape unpacked, where no trained copy stands in for it.

    It goes under its first name.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        copied = set(_copied(module)) if isinstance(module, AdaptedLayer) else ()
        storage = storage_of(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in copied and id(parameter) not in seen:
                seen.add(id(parameter))
                shape = parameter.shape
                if storage is not None and name == WEIGHT:
                    shape = storage.shape(module)
                yield f"{path}.{name}".lstrip("."), parameter, shape


def _copied(layer: AdaptedLayer) -> Iterator[str]:
    """Yield the parameters and buffers of a layer of which an adapter holds a trained copy."""
    for name in layer.adapter:
        parts = layer.parts(name).items()
        yield from (slot for slot, part in parts if isinstance(part, ReplaceAdapter))
