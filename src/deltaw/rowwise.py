"""A layer whose rows are under adapters of their own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.errors import StateError
from deltaw.rowmap import Division, RowMap, Seen

if TYPE_CHECKING:
    from deltaw.layer import AdaptedLayer


class RowError(StateError):
    """A layer cannot tell which adapter its rows are under; `deltaw.rows` adds its name."""

    def __init__(self, layer: "AdaptedLayer", problem: str) -> None:
        super().__init__(problem)
        self.layer = layer
        self.problem = problem


def each_row(
    layer: "AdaptedLayer", rows: RowMap, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the layer's output with every row under its own adapter.

    Raises:
        RowError: if the layer has several inputs, or as many rows as no multiple of the map's.
    """
    compiling = torch.compiler.is_compiling()
    seen = _look(layer, rows) if compiling else rows.seen.get(id(layer))
    if seen is None:
        seen = rows.seen[id(layer)] = _look(layer, rows)
    if not seen.held:
        return layer.base(*args, **kwargs)
    if not layer.tells_rows:
        raise RowError(layer, "applies its parameters to tokens that it sorts by itself")
    if len(args) + len(kwargs) != 1:
        raise RowError(layer, "has several inputs, so its rows cannot be told apart")
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    count = x.shape[0] if x.dim() else 0
    if count == 0 or count % len(rows.index):
        raise RowError(
            layer,
            f"got {count or 'no'} rows, and {len(rows.index)} rows of the batch have adapters of "
            "their own; it can be as many, or a multiple: each row several times (beams), or its "
            "tokens one after another",
        )
    if compiling and not seen.copies:
        return _at_once(layer, x, rows)
    division = rows.divide(count, x.device)
    if len(division.distinct) == 1 and division.together:
        with layer.authority.only(seen.held[0]):
            return layer.alike(x)
    layer.authority.note_forward()
    if seen.copies:
        return _in_turn(layer, x, division)
    output = layer.fused_rows(x, seen, division)
    return _one_by_one(layer, x, division) if output is None else output


def _look(layer: "AdaptedLayer", rows: RowMap) -> Seen:
    held = tuple(name for name in rows.distinct if name in layer.adapter)
    return Seen(held, any(part.replaces for n in held for part in layer.parts(n).values()))


def _in_turn(layer: "AdaptedLayer", x: Tensor, division: Division) -> Tensor:
    """Run the whole layer for the rows of each adapter."""
    places = [(name, place) for place, name in enumerate((*division.distinct, None))]
    found: list[tuple[Tensor, Tensor]] = []
    for name, place in places:
        rows = (division.index == place).nonzero().squeeze(1)
        if len(rows):
            with layer.authority.only(name):
                part = layer.alike(x[rows])
            if not isinstance(part, Tensor):
                kind = type(part).__name__
                raise RowError(layer, f"is trained in full and returns a {kind}, no single tensor")
            found.append((rows, part))
    order = torch.cat([rows for rows, _ in found]).argsort()
    return torch.cat([part for _, part in found])[order]


def _one_by_one(layer: "AdaptedLayer", x: Tensor, division: Division) -> Tensor:
    """Run the base once and add what each adapter contributes to its rows, in plain steps."""
    y = layer.base(x)
    for name, rows in division.runs:
        index = torch.arange(len(x), device=x.device)[rows]
        part = layer.added(x[index], y[index], layer.contributions([(name, 1.0)]))
        y = y.index_copy(0, index, part)
    return y


def _at_once(layer: "AdaptedLayer", x: Tensor, rows: RowMap) -> Tensor:
    """Do the same for all rows under every adapter and choose, which a compiler makes one graph."""
    base = y = layer.base(x)
    index = rows.index.repeat_interleave(x.shape[0] // rows.index.shape[0])
    index = index.to(x.device).view(-1, *[1] * (y.dim() - 1))
    for place, name in enumerate(rows.distinct):
        parts = layer.contributions([(name, 1.0)])
        if parts:
            y = torch.where(index == place, layer.added(x, base, parts), y)
    return y
