"""What the active adapters add to one weight when they are merged."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.adapter import Dense, LowRank, Rescaled, Update
from deltaw.authority import Active
from deltaw.kernels.merge import add_products
from deltaw.layer import AdaptedLayer
from deltaw.parts import weighted

ROWS = 16
"""How many rows tell what rounding takes from a layer's update."""


@dataclass(frozen=True)
class Addition:
    """What the active adapters add to one weight: products of thin factors, and whole matrices.

    All are in the layout of the weight, products as one of its readings as a matrix, and in
    float32 or wider; `shift` is for the bias of the outputs.
    """

    products: list[tuple[Tensor, Tensor]]
    dense: list[Tensor]
    shift: Tensor | None

    def to(self, W: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return W + ΔW rounded once to `dtype`, or not at all."""
        if self.dense:
            wide = functools.reduce(torch.add, self.dense)
            W = W.to(wide.dtype) + wide
        if not self.products:
            return W if dtype is None else W.to(dtype)
        L, R = self.products[0]
        if L.dim() == 2:
            return add_products(W.reshape(len(L), R.shape[1]), self.products, dtype).view(W.shape)
        new = torch.empty(W.shape, dtype=dtype or L.dtype, device=W.device)
        for one, into in enumerate(new):
            into.copy_(add_products(W[one], [(L[one], R[one]) for L, R in self.products], dtype))
        return new

    def lost(self, W: Tensor, merged: Tensor) -> float | None:
        """Return the share of ΔW that rounding took from some rows; None in full precision."""
        wide = torch.promote_types(torch.float32, merged.dtype)
        if wide == merged.dtype:
            return None
        if self.products and self.products[0][0].dim() > 2:
            products = [(L[0], R[0]) for L, R in self.products]
            first = Addition(products, [M[0] for M in self.dense], None)
            return first.lost(W[0], merged[0])
        shape = (len(W), W[0].numel())
        if self.products:
            shape = len(self.products[0][0]), self.products[0][1].shape[1]
        rows = torch.linspace(0, shape[0] - 1, min(shape[0], ROWS), device=W.device).long()
        some = [L[rows] @ R for L, R in self.products]
        some += [M.reshape(shape)[rows] for M in self.dense]
        update = functools.reduce(torch.add, some)
        before, stored = W.reshape(shape)[rows].to(wide), merged.reshape(shape)[rows].to(wide)
        return float((stored - (before + update)).norm() / update.norm().clamp(1e-30))


def addition_of(layer: AdaptedLayer, active: Active, name: str) -> Addition:
    """Return what the active adapters add to the parameter `name` of a layer."""
    products: list[tuple[Tensor, Tensor]] = []
    dense: list[Tensor] = []
    shifts: list[Tensor] = []
    for key, weight in active:
        for slot, adapter in layer.parts(key).items():
            if adapter.replaces or layer.holder(slot) != name:
                continue
            wide = torch.promote_types(torch.float32, layer.frozen(name).dtype)
            matrix = functools.partial(_wide_matrix, layer, slot, wide)
            update = _widened(adapter(matrix), wide)
            thin = _thin(layer, update, slot, weight)
            if thin is not None:
                products.append(thin)
            else:
                dense.append(layer.layout(weighted(_matrix(update, matrix), weight), slot))
            if update.shift is not None:
                shifts.append(weighted(layer.spread(update.shift, slot), weight))
    return Addition(products, dense, functools.reduce(torch.add, shifts) if shifts else None)


def _widened(update: Update, dtype: torch.dtype) -> Update:
    """Return the same in `dtype`, whatever its factors are kept in."""
    shift = None if update.shift is None else update.shift.to(dtype)
    if isinstance(update, LowRank):
        return LowRank(update.A.to(dtype), update.B.to(dtype), update.scale, shift)
    if isinstance(update, Rescaled):
        return update._replace(gain=update.gain.to(dtype), shift=shift)
    return Dense(update.M.to(dtype), shift)


def _thin(
    layer: AdaptedLayer, update: Update, slot: str, weight: float
) -> tuple[Tensor, Tensor] | None:
    if not isinstance(update, LowRank):
        return None
    return layer.thin(update.A, update.B * (update.scale * weight), slot)


def _wide_matrix(layer: AdaptedLayer, slot: str, dtype: torch.dtype) -> Tensor:
    return layer.matrix(slot).to(dtype)


def _matrix(update: Update, matrix: Callable[[], Tensor]) -> Tensor:
    """Return ΔW (out, in); `matrix` returns W."""
    if isinstance(update, LowRank):
        return update.scale * update.B @ update.A
    return update.matrix(matrix()) if isinstance(update, Rescaled) else update.M
