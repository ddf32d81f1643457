"""From products back to the tensors of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltaw.combine._deltas import (
    EXPERTS,
    MAGNITUDE,
    Key,
    Matrix,
    Product,
    bias_in_one,
    copies,
    dtype_of,
    in_one,
    number_of,
    products,
    shifts,
    wide,
)
from deltaw.errors import MergeError
from deltaw.kernels.norms import row_norms
from deltaw.state import LayerState


def layer_of(
    like: LayerState,
    sizes: tuple[int, ...],
    parts: Mapping[Key, Product],
    biases: Mapping[str, Tensor],
    dtype: torch.dtype,
    matrix: Matrix | None = None,
) -> LayerState:
    """Return the layer of these products, of scale 1; all get the rank of the largest.

    `like` says the kind of layer, which of its slices are adapted and which of its parameters are
    stacks, `sizes` those of a convolution's kernel, and `matrix` gives W where there are gains.

    Raises:
        MergeError: where the gains take a row of W away, which leaves DoRA without a direction.
    """
    r = max(part.R.shape[0] for part in parts.values())
    tensors: dict[str, Tensor] = {}
    for slot in dict.fromkeys(slot for slot, _ in parts):
        own = [padded(part, r) for (name, _), part in parts.items() if name == slot]
        if matrix is not None:
            own, m = _directed(own, matrix(slot))
            tensors[f"{slot}.{MAGNITUDE}"] = m.to(dtype)
        if like.enabled and not like.enabled[number_of(slot)]:
            continue
        A, B = [part.R for part in own], [part.L for part in own]
        if like.kind != EXPERTS:
            a, b = torch.cat(A), torch.cat(B)
            a = a.reshape(len(a), -1, *sizes)
        elif like.tensors[f"{slot}.lora_A"].dim() == 3:
            a, b = torch.stack(A), torch.stack(B)
        else:
            a, b = A[0], B[0]
        tensors[f"{slot}.lora_A"] = a.to(dtype).contiguous()
        tensors[f"{slot}.lora_B"] = b.to(dtype).contiguous()
        if slot in biases:
            tensors[f"{slot}.lora_B_bias"] = biases[slot].to(dtype)
    return replace(like, tensors=tensors, scale=1.0, scales={})


def padded(part: Product, r: int) -> Product:
    """Return the same product with zeros up to rank r."""
    more = r - part.R.shape[0]
    if not more:
        return part
    L, R, gain = part
    wider = torch.cat([L, L.new_zeros(len(L), more)], 1)
    return Product(wider, torch.cat([R, R.new_zeros(more, R.shape[1])]), gain)


def unfused(layer: LayerState) -> LayerState:
    """Return fused slices as one linear layer, whose B is zero off their blocks."""
    if layer.kind != "fused":
        return layer
    slices = len(layer.enabled)
    whole, bias = in_one(products(layer), slices), bias_in_one(shifts(layer), slices)
    made = layer_of(replace(layer, kind="linear", enabled=()), (), whole, bias, dtype_of(layer))
    return replace(made, tensors={**made.tensors, **copies(layer)})


def _directed(parts: Sequence[Product], W: Tensor) -> tuple[list[Product], Tensor]:
    """Return L, R and m with m ∘ V / ‖V‖ = W + gain ∘ W + L' R for V = W + L R.

    With d = 1 + gain that is L = L' / d and m = d ‖V‖, row by row.
    """
    directed, magnitudes = [], []
    for (L, R, gain), rows in zip(parts, wide(W).chunk(len(parts)), strict=True):
        d = 1 + (L.new_zeros(len(L)) if gain is None else gain)
        if not d.all():
            raise MergeError(
                f"The gains of these DoRA adapters cancel {int((d == 0).sum())} rows of W, which "
                "leaves them without a direction.\nFix: use other weights, or merge the adapters "
                "and extract the difference (deltaw extract)."
            )
        turned = Product(L / d[:, None], R)
        directed.append(turned)
        magnitudes.append(d * row_norms(rows, R, turned.L, 1.0))
    return directed, torch.cat(magnitudes)
