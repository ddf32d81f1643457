"""Where a checkpoint holds the matrices of a model's layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaw.combine._deltas import EXPERTS

ATTENTION = "attention"
TRANSPOSED = ("conv1d", "embedding")
WEIGHT = "weight"


@dataclass(frozen=True)
class Slot:
    """The names under which a checkpoint may hold a slot, as one of `blocks` blocks of rows."""

    keys: tuple[str, ...]
    block: int = 0
    blocks: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slot's rows."""
        return tensor.chunk(self.blocks)[self.block]


@dataclass(frozen=True)
class Place:
    """A layer of a model: its kind, and where a checkpoint may hold each of its slots.

    Stacks of experts may be `transposed`, (E, in, out) instead of (E, out, in).
    """

    kind: str
    slots: Mapping[str, Slot]
    groups: int = 1
    transposed: bool = False

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return a slot as the matrices (out, in) of which ΔW are elements, one for each expert."""
        if self.kind == EXPERTS:
            return list(weight.mT if self.transposed else weight)
        if self.kind == "conv_transpose":
            apart = weight.view(self.groups, -1, *weight.shape[1:])
            return [apart.transpose(1, 2).flatten(0, 1).flatten(1)]
        return [weight.T if self.kind in TRANSPOSED else weight.flatten(1)]

    def side(self, slot: str, shape: tuple[int, ...]) -> int:
        """Return the highest rank that a slot can have in a tensor of this shape."""
        if self.kind == EXPERTS:
            return min(shape[1:])
        return min(shape[0] // self.slots[slot].blocks, math.prod(shape[1:]))


def attention_slots(path: str, packed: bool) -> dict[str, Slot]:
    """Return those of `nn.MultiheadAttention`, whose q, k and v may be `packed` in one weight."""
    if packed:
        inputs = {name: Slot((f"{path}.in_proj_weight",), n, 3) for n, name in enumerate("qkv")}
    else:
        inputs = {name: Slot((f"{path}.{name}_proj_weight",)) for name in "qkv"}
    return {**inputs, "out": Slot((f"{path}.out_proj.weight",))}
