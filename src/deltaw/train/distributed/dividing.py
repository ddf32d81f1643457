"""Work on held-out rows, divided among the processes that train together."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from deltaw.train.distributed.processes import count, gathered, rank

Piece = TypeVar("Piece")
Found = TypeVar("Found")


def divided(
    pieces: Sequence[Piece], compute: Callable[[Piece], Found], *, whole: nn.Module | None = None
) -> list[Found]:
    """Return what `compute` makes of each piece; several processes do a share each, and all know.

    All compute equally often, as a model whose weights are shared out needs: one that has a piece
    less computes the last one too. Where pieces need more of its forwards than others, it must be
    `whole`; else nothing is divided.
    """
    if not dist.is_initialized() or (whole is not None and _is_shared_out(whole)):
        return [compute(piece) for piece in pieces]
    size, last = count(), len(pieces) - 1
    turns = range(rank(), -(-len(pieces) // size) * size, size)
    found = gathered([compute(pieces[min(turn, last)]) for turn in turns])
    return [found[number % size][number // size] for number in range(len(pieces))]


def _is_shared_out(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in model.modules())
