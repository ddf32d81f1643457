"""ΔW of a layer as independent products L R in float64, whatever its kind.

| layer | products |
|---|---|
| linear, conv1d, embedding, conv | one, of B and A |
| fused | one for every adapted slice |
| conv that spans all groups | one for every group |
| experts | one for every parameter and expert |

Under DoRA every row of W has a gain beside them, in fused layers those of all slices (`bases`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.norms import row_norms
from deltaw.state import IDS, ROWS, LayerState, without_twin


class Product(NamedTuple):
    """ΔW = diag(gain) W + L R with L (out, k), R (k, in) and gain (out,); the scale is in L."""

    L: Tensor
    R: Tensor
    gain: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix L R (out, in)."""
        return self.L.to(dtype) @ self.R.to(dtype)


Key = tuple[str, int]
"""A slot, and the group of a convolution whose A spans them all, or the expert."""
Matrix = Callable[[str], Tensor]
"""From a slot to its W (out, in)."""
EXPERTS = "experts"
MAGNITUDE = "lora_magnitude_vector"
ALONGSIDE = (".trained", f".{ROWS}", f".{IDS}")
"""Endings of what stands for itself, and is no factor of a ΔW."""


def slots(layer: LayerState) -> list[str]:
    """Return the slots that have a low-rank ΔW, slices in order."""
    if layer.enabled:
        return [f"slice_{index}" for index, on in enumerate(layer.enabled) if on]
    return [name.removesuffix(".lora_A") for name in layer.tensors if name.endswith(".lora_A")]


def copies(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors trained in full, and the rows of tables that are, with their tokens."""
    return {name: t for name, t in layer.tensors.items() if name.endswith(ALONGSIDE)}


def kernel(layer: LayerState) -> tuple[int, ...]:
    """Return the sizes of a convolution's kernel, or nothing."""
    return () if layer.kind == EXPERTS else tuple(pair(layer, slots(layer)[0])[0].shape[2:])


def pair(layer: LayerState, slot: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a slot, of twice the rank where a start is subtracted."""
    A, B = layer.tensors[f"{slot}.lora_A"], layer.tensors[f"{slot}.lora_B"]
    A0, B0 = layer.tensors.get(f"{slot}.start_A"), layer.tensors.get(f"{slot}.start_B")
    return (A, B) if A0 is None or B0 is None else without_twin(A, B, A0, B0)


def count_in(layer: LayerState, slot: str) -> int:
    """Return how many independent products a slot holds."""
    A, B = pair(layer, slot)
    if layer.kind == EXPERTS:
        return len(A) if A.dim() == 3 else 1
    return A.shape[0] // B.shape[1]


def matrix_shape(layer: LayerState, slot: str) -> tuple[int, int]:
    """Return (out, in) of the matrix that B A of a slot is added to."""
    A, B = pair(layer, slot)
    return (B.shape[-2], A.shape[-1]) if layer.kind == EXPERTS else (len(B), A[0].numel())


def rank_of(layer: LayerState, slot: str) -> int:
    """Return the rows of A, those of one expert."""
    A, _ = pair(layer, slot)
    return A.shape[-2] if layer.kind == EXPERTS else len(A)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def products(
    layer: LayerState, weight: float = 1.0, matrix: Matrix | None = None
) -> dict[Key, Product]:
    """Return `weight` ΔW of every slot and group, with gains where `matrix` gives the base's W."""
    found: dict[Key, Product] = {}
    for slot in slots(layer):
        A, B = pair(layer, slot)
        count = count_in(layer, slot)
        stacked = layer.kind == EXPERTS
        L = wide(B).reshape(-1, B.shape[-1]) * layer.scale_of(slot)
        R = wide(A).reshape(-1, A.shape[-1]) if stacked else wide(A).flatten(1)
        for group, (left, right) in enumerate(zip(L.chunk(count), R.chunk(count), strict=True)):
            found[slot, group] = Product(left, right)
    if matrix is not None:
        found = _gained(layer, found, matrix)
    return {
        key: Product(L * weight, R, None if gain is None else gain * weight)
        for key, (L, R, gain) in found.items()
    }


def _gained(layer: LayerState, found: Mapping[Key, Product], matrix: Matrix) -> dict[Key, Product]:
    """Return the products as (g - 1) W + g L R, with 0 in the place of g - 1 without a magnitude.

    Slices that are not adapted have a gain too, and no factors.
    """
    made: dict[Key, Product] = {}
    for slot in [f"slice_{n}" for n in range(len(layer.enabled))] or slots(layer):
        own = {key: part for key, part in found.items() if key[0] == slot}
        if not own:
            rows, width = matrix_shape(layer, slots(layer)[0])
            L = next(iter(found.values())).L
            own = {(slot, 0): Product(L.new_zeros(rows, 0), L.new_zeros(0, width))}
        m = layer.tensors.get(f"{slot}.{MAGNITUDE}")
        gains: list[Tensor | None] = [None] * len(own)
        if m is not None:
            blocks = wide(matrix(slot)).chunk(len(own))
            norms = [
                row_norms(W, R, L, 1.0) for W, (L, R, _) in zip(blocks, own.values(), strict=True)
            ]
            gains = list((wide(m).flatten() / torch.cat(norms)).chunk(len(own)))
        for (key, (L, R, _)), g in zip(own.items(), gains, strict=True):
            made[key] = (
                Product(L, R, L.new_zeros(len(L)))
                if g is None
                else Product(L * g[:, None], R, g - 1)
            )
    return made


def shifts(layer: LayerState, weight: float = 1.0) -> dict[str, Tensor]:
    """Return `weight` times what each slot adds to the layer's bias."""
    found = {}
    for name, tensor in layer.tensors.items():
        if name.endswith(".lora_B_bias"):
            slot = name.removesuffix(".lora_B_bias")
            found[slot] = wide(tensor) * (weight * layer.scale_of(slot))
    return found


def dtype_of(*layers: LayerState) -> torch.dtype:
    """Return the widest dtype of the factors, float32 at least."""
    dtypes = [pair(layer, slot)[0].dtype for layer in layers for slot in slots(layer)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def in_one(parts: Mapping[Key, Product], slices: int) -> dict[Key, Product]:
    """Return the products of fused slices as one of the whole layer, zero off their blocks."""
    first = next(iter(parts.values()))
    rows, gained = len(first.L), first.gain is not None
    blocks = torch.block_diag(*(part.L for part in parts.values()))  # type: ignore[no-untyped-call]
    L = blocks.new_zeros(slices, rows, blocks.shape[1])
    gain = blocks.new_zeros(slices, rows)
    for part, block, (slot, _) in zip(parts.values(), blocks.split(rows), parts, strict=True):
        L[number_of(slot)] = block
        if part.gain is not None:
            gain[number_of(slot)] = part.gain
    R = torch.cat([part.R for part in parts.values()])
    return {("weight", 0): Product(L.flatten(0, 1), R, gain.flatten() if gained else None)}


def bias_in_one(biases: Mapping[str, Tensor], slices: int) -> dict[str, Tensor]:
    """Return what fused slices add to the bias as one of the whole layer, if any does."""
    if not biases:
        return {}
    whole = next(iter(biases.values())).new_zeros(slices, len(next(iter(biases.values()))))
    for slot, shift in biases.items():
        whole[number_of(slot)] = shift
    return {"weight": whole.flatten()}


def number_of(slot: str) -> int:
    """Return the place of a fused slice."""
    return int(slot.removeprefix("slice_"))


def side_by_side(parts: Sequence[Product]) -> Product:
    """Return the sum of products: [L₁, L₂, ...], [R₁; R₂; ...] and the sum of the gains."""
    gains = [part.gain for part in parts if part.gain is not None]
    return Product(
        torch.cat([part.L for part in parts], 1),
        torch.cat([part.R for part in parts]),
        torch.stack(gains).sum(0) if gains else None,
    )
