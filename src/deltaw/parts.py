"""What the adapters in force add to one layer, and how their weights come in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import LowRank, Update
from deltaw.kernels import why_not
from deltaw.kernels.dropout import rounded


class Part(NamedTuple):
    """What one adapter in force adds in one slot: its ΔW, its weight, and its dropout now."""

    slot: str
    update: Update
    weight: float | Tensor
    p: float


def joinable(x: Tensor, parts: Sequence[Part]) -> bool:
    """Tell whether one kernel can take all parts: low-rank ones with the same dropout."""
    for part in parts:
        update = part.update
        if type(update) is not LowRank or part.p != parts[0].p:
            return False
        if isinstance(update.scale, Tensor):
            return False
        if why_not(x, update.A, update.B, update.shift):
            return False
    return True


def factors(part: Part) -> tuple[Tensor, Tensor]:
    """Return A and B of a low-rank part."""
    assert isinstance(part.update, LowRank)
    return part.update.A, part.update.B


def total_scale(part: Part) -> float:
    """Return what a kernel multiplies B A by, which scales up what dropout keeps too."""
    assert isinstance(part.update, LowRank)
    scale = part.update.scale * part.weight
    assert isinstance(scale, float)
    return scale / (1 - rounded(part.p)) if part.p else scale


def mixed(frozen: Tensor, copies: list[tuple[Tensor, float | Tensor]]) -> Tensor:
    """Return `(1 - Σ weight) P + Σ weight copy`, or the only copy itself under weight 1."""
    if not copies:
        return frozen
    first, weight = copies[0]
    if len(copies) == 1 and isinstance(weight, float) and weight == 1:
        return first
    rest = 1 - sum(weight for _, weight in copies)
    wide = frozen.to(torch.promote_types(frozen.dtype, first.dtype))
    return sum((weighted(copy, weight) for copy, weight in copies), rest * wide)


def weighted(tensor: Tensor, weight: float | Tensor) -> Tensor:
    """Return `weight * tensor`; what has weight 0 counts as nothing, NaN included."""
    if isinstance(weight, Tensor):
        return torch.where(weight != 0, tensor * weight, 0)
    return tensor if weight == 1 else tensor * weight
