"""What the adapters in force add to one layer, and how their weights come in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import Dense, LowRank, Rescaled, Update
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


def sole_gain(x: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """Return g of the only part, rescaled as a whole and without dropout, if a kernel takes it."""
    slot, update, weight, p = parts[0]
    if len(parts) > 1 or type(update) is not Rescaled or slot != "weight" or weight != 1 or p:
        return None
    return None if why_not(x, update.A, update.B, update.shift, update.gain) else update.gain


def gains_of(x: Tensor, found: Sequence[Sequence[Part]]) -> list[Tensor | None] | None:
    """Return g of each adapter, None for those without; None where no kernel takes all parts."""
    gains = [sole_gain(x, own) if own else None for own in found]
    others = [p for own, gain in zip(found, gains, strict=True) if gain is None for p in own]
    rescaled = any(gain is not None for gain in gains)
    if not joinable(x, others) or (rescaled and any(part.p for part in others)):
        return None
    return gains


def factors(part: Part) -> tuple[Tensor, Tensor]:
    """Return A and B of a part that has them."""
    assert not isinstance(part.update, Dense)
    return part.update.A, part.update.B


def total_scale(part: Part) -> float:
    """Return what a kernel multiplies B A by, which scales up what dropout keeps too."""
    assert not isinstance(part.update, Dense)
    scale = part.update.scale * part.weight
    assert isinstance(scale, float)
    return scale / (1 - rounded(part.p)) if part.p else scale


def weighted(tensor: Tensor, weight: float | Tensor) -> Tensor:
    """Return `weight * tensor`; what has weight 0 counts as nothing, NaN included."""
    if isinstance(weight, Tensor):
        return torch.where(weight != 0, tensor * weight, 0)
    return tensor if weight == 1 else tensor * weight
