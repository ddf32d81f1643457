"""ΔW of a layer as independent products L R in float64, whatever its kind, and back.

| layer | products |
|---|---|
| linear, conv1d, embedding, conv | one, of B and A |
| fused | one for every adapted slice |
| conv that spans all groups | one for every group |
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.state import LayerState, without_twin


class Product(NamedTuple):
    """ΔW = L R with L (out, k) and R (k, in); the scale is in L."""

    L: Tensor
    R: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in)."""
        return self.L.to(dtype) @ self.R.to(dtype)


Key = tuple[str, int]
"""A slot, and the group of a convolution whose A spans them all."""


def slots(layer: LayerState) -> list[str]:
    """Return the slots that have a low-rank ΔW, slices in order."""
    if layer.enabled:
        return [f"slice_{index}" for index, on in enumerate(layer.enabled) if on]
    return [name.removesuffix(".lora_A") for name in layer.tensors if name.endswith(".lora_A")]


def copies(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors trained in full."""
    return {name: t for name, t in layer.tensors.items() if name.endswith(".trained")}


def kernel(layer: LayerState) -> tuple[int, ...]:
    """Return the sizes of a convolution's kernel, or nothing."""
    return tuple(pair(layer, slots(layer)[0])[0].shape[2:])


def pair(layer: LayerState, slot: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a slot, of twice the rank where a start is subtracted."""
    A, B = layer.tensors[f"{slot}.lora_A"], layer.tensors[f"{slot}.lora_B"]
    A0, B0 = layer.tensors.get(f"{slot}.start_A"), layer.tensors.get(f"{slot}.start_B")
    return (A, B) if A0 is None or B0 is None else without_twin(A, B, A0, B0)


def groups_in(layer: LayerState, slot: str) -> int:
    """Return how many independent products a slot holds."""
    A, B = pair(layer, slot)
    return A.shape[0] // B.shape[1]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def products(layer: LayerState, weight: float = 1.0) -> dict[Key, Product]:
    """Return `weight` ΔW of every slot and group."""
    found = {}
    for slot in slots(layer):
        A, B = pair(layer, slot)
        count = groups_in(layer, slot)
        L, R = wide(B) * (weight * layer.scale), wide(A).flatten(1)
        for group, (left, right) in enumerate(zip(L.chunk(count), R.chunk(count), strict=True)):
            found[slot, group] = Product(left, right)
    return found


def shifts(layer: LayerState, weight: float = 1.0) -> dict[str, Tensor]:
    """Return `weight` times what each slot adds to the layer's bias."""
    return {
        name.removesuffix(".lora_B_bias"): wide(tensor) * (weight * layer.scale)
        for name, tensor in layer.tensors.items()
        if name.endswith(".lora_B_bias")
    }


def dtype_of(*layers: LayerState) -> torch.dtype:
    """Return the widest dtype of the factors, float32 at least."""
    dtypes = [pair(layer, slot)[0].dtype for layer in layers for slot in slots(layer)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def layer_of(
    like: LayerState,
    sizes: tuple[int, ...],
    parts: Mapping[Key, Product],
    biases: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> LayerState:
    """Return the layer of these products, of scale 1; all get the rank of the largest.

    `like` says the kind of layer and `sizes` those of a convolution's kernel.
    """
    r = max(part.R.shape[0] for part in parts.values())
    tensors = {}
    for slot in dict.fromkeys(slot for slot, _ in parts):
        own = [padded(part, r) for (name, _), part in parts.items() if name == slot]
        A = torch.cat([part.R for part in own])
        tensors[f"{slot}.lora_A"] = A.reshape(len(A), -1, *sizes).to(dtype).contiguous()
        tensors[f"{slot}.lora_B"] = torch.cat([part.L for part in own]).to(dtype).contiguous()
        if slot in biases:
            tensors[f"{slot}.lora_B_bias"] = biases[slot].to(dtype)
    return replace(like, tensors=tensors, scale=1.0)


def padded(part: Product, r: int) -> Product:
    """Return the same product with zeros up to rank r."""
    more = r - part.R.shape[0]
    if not more:
        return part
    L, R = part
    return Product(
        torch.cat([L, L.new_zeros(len(L), more)], 1), torch.cat([R, R.new_zeros(more, R.shape[1])])
    )


def unfused(layer: LayerState) -> LayerState:
    """Return fused slices as one linear layer, whose B is zero off their blocks."""
    if layer.kind != "fused":
        return layer
    parts = list(products(layer).values())
    flags, rows = torch.tensor(layer.enabled), len(parts[0].L)
    blocks = torch.block_diag(*(part.L for part in parts))  # type: ignore[no-untyped-call]
    L = blocks.new_zeros(len(flags), rows, blocks.shape[1])
    L[flags] = blocks.view(len(parts), rows, -1)
    whole = {("weight", 0): Product(L.flatten(0, 1), torch.cat([part.R for part in parts]))}
    bias, own = L.new_zeros(len(flags), rows), shifts(layer)
    for slot, shift in own.items():
        bias[int(slot.removeprefix("slice_"))] = shift
    like = replace(layer, kind="linear", enabled=())
    made = layer_of(like, (), whole, {"weight": bias.flatten()} if own else {}, dtype_of(layer))
    return replace(made, tensors={**made.tensors, **copies(layer)})
