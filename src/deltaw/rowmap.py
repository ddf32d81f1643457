"""Which adapter each row of a batch is under: pure data, worked out once per number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.bank import Bank
from deltaw.kernels.segments import Rows


class Run(NamedTuple):
    """The rows of one adapter, as a slice where they lie together."""

    name: str
    rows: Rows


class Division:
    """The rows of an input that has as many as the map or a multiple."""

    def __init__(self, index: Tensor, distinct: tuple[str, ...]) -> None:
        self.index = index
        self.distinct = distinct

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The rows of each adapter; rows under none are in no run."""
        return tuple(Run(name, self._rows(place)) for place, name in enumerate(self.distinct))

    @cached_property
    def together(self) -> bool:
        """Whether all rows are under adapters, those of each lie together and are equally many."""
        counts = torch.bincount(self.index, minlength=len(self.distinct) + 1)
        grouped = (self.index.diff() >= 0).all()
        return bool(grouped & (counts[-1] == 0) & (counts[:-1] == counts[0]).all())

    def _rows(self, place: int) -> Rows:
        rows = (self.index == place).nonzero().squeeze(1)
        first, last = int(rows[0]), int(rows[-1])
        return slice(first, last + 1) if last - first + 1 == len(rows) else rows


@dataclass
class Seen:
    """What is known of one layer as long as a block lasts.

    `held` are the adapters of the map that it has, `copies` tells whether one of them trained a
    parameter in full, `passed` whether it ran without gradients, and `banks` hold
    stacked factors by dtype and by whether the layer is in training mode.
    """

    held: tuple[str, ...]
    copies: bool
    passed: bool = False
    banks: dict[tuple[torch.dtype, bool], Bank] = field(default_factory=dict)


class RowMap:
    """The adapter, or None, of each row of a batch.

    `index` is the place of each row's adapter in `distinct`, one beyond for none; `seen` is kept
    by the identity of the layer.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.distinct = tuple(dict.fromkeys(name for name in names if name is not None))
        places = {name: place for place, name in enumerate((*self.distinct, None))}
        self.index = torch.tensor([places[name] for name in names], dtype=torch.int64)
        self.seen: dict[int, Seen] = {}
        self._divisions: dict[tuple[int, torch.device], Division] = {}

    def forget(self) -> None:
        """Forget what is known of the layers and of their inputs."""
        self.seen.clear()
        self._divisions.clear()

    def divide(self, count: int, device: torch.device) -> Division:
        """Return how `count` rows on a device divide, a multiple of the map's.

        k x rows are each row k times: beams, or the tokens of a flattened sequence.
        """
        key = count, device
        if key not in self._divisions:
            index = self.index.repeat_interleave(count // len(self.index)).to(device)
            self._divisions[key] = Division(index, self.distinct)
        return self._divisions[key]
