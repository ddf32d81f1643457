"""Parameters that a module applies by itself, such as the stacked experts of a mixture.

A slot is one parameter: a matrix (out, in), or a stack (E, out, in) of one matrix for each expert,
which is stored as (E, in, out) where the module says `is_transposed`, as transformers has it. The
module runs its own forward, and with it whichever implementation of the experts is configured;
reading the parameter gives an `AdaptedWeight`, so that each token meets the factors of its expert
and no ΔW is formed.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import Adapter, Dense, LowRank, Rescaled
from deltaw.layers.module import TrainedModule
from deltaw.parts import weighted
from deltaw.readable import Readable
from deltaw.weight import AdaptedWeight, Thin


class Experts(TrainedModule):
    """A module with adapted parameters of two or three dimensions."""

    kind = "experts"
    tells_rows = False
    _read: dict[str, Tensor | AdaptedWeight] | None = None

    @classmethod
    def overrides(cls, slot: str, adapter: Adapter) -> bool:
        """Tell that every adapted parameter is read from its adapters."""
        return True

    def holder(self, slot: str) -> str:
        """Return the parameter of the slot's own name."""
        return slot

    def stacked(self, slot: str) -> int:
        """Return the number of experts, or 0 for one matrix."""
        P = self.frozen(slot)
        return len(P) if P.dim() == 3 else 0

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in) of every expert."""
        out, into = self.matrix(slot).shape[-2:]
        return out, into

    def matrix(self, slot: str) -> Tensor:
        """Return the parameter as (out, in) or (E, out, in)."""
        return self._turned(self.frozen(slot))

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M as the parameter is stored."""
        return self._turned(M)

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """Return L and R, of every expert, with L R in the layout of the parameter."""
        return (A.mT, B.mT) if self._turned(A) is not A else (B, A)

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B, with the axis of the experts in front."""
        out, into = self.shape(slot)
        count = self.matrix(slot).shape[:-2]
        return (*count, r, into), (*count, out, r)

    def alike(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original forward, in which a parameter is the same object at every reading."""
        if torch.compiler.is_compiling():
            return self.base(*args, **kwargs)
        vars(self)["_read"] = {}
        try:
            return self.base(*args, **kwargs)
        finally:
            del vars(self)["_read"]

    def adapted(self, name: str, P: Tensor | Readable) -> Tensor | Readable:
        """Return the parameter with the factors of its adapters in force."""
        if isinstance(P, Readable):
            return P
        if self._read is None:
            return self._with_factors(name, P)
        if name not in self._read:
            self._read[name] = self._with_factors(name, P)
        return self._read[name]

    def _with_factors(self, name: str, P: Tensor) -> Tensor | AdaptedWeight:
        thin: list[Thin] = []
        for slot, adapter, weight in self.contributors():
            if slot != name:
                continue
            update = adapter(functools.partial(self.matrix, slot))
            if isinstance(update, LowRank):
                L, R = self.thin(update.A, update.B, slot)
                thin.append(Thin(L, R, update.scale, weight))
            else:
                P = self._with_matrix(P, update, slot, weight)
        return AdaptedWeight(P, thin) if thin else P

    def _with_matrix(
        self, P: Tensor, update: Dense | Rescaled, slot: str, weight: float | Tensor
    ) -> Tensor:
        wide = torch.promote_types(torch.float32, P.dtype)
        M = update.M if isinstance(update, Dense) else update.matrix(self.matrix(slot).to(wide))
        return (P.to(wide) + weighted(self.layout(M, slot), weight)).to(P.dtype)

    @property
    def is_turned(self) -> bool:
        """Whether the module stores its stacks as (E, in, out)."""
        return bool(getattr(self, "is_transposed", False))

    def _turned(self, stack: Tensor) -> Tensor:
        """Exchange (E, out, in) and (E, in, out) where the module stores the second."""
        return stack.mT if stack.dim() == 3 and self.is_turned else stack
