"""One layer's tensors as PEFT stores them, and back: convolutions with groups, fused slices.

PEFT knows one (A, B) per layer. A grouped convolution of ours shares A (r, in/groups, *kernel)
between the groups; PEFT's A (r groups, in, *kernel) spans all input channels, so ours is written
once per group with zeros off it. Fused slices are stacked: A (n r, in) of all n adapted slices, and
B (out, n r) with zeros off the blocks; DoRA's magnitudes are those of all slices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from deltaw.formats._parts import B_BIAS, MAGNITUDE, TRAINED, A, B, factors
from deltaw.state import LayerState


def pack(layer: LayerState) -> dict[str, Tensor]:
    """Return one A, one B and perhaps a bias of B, in PEFT's shapes."""
    tensors = factors(layer)
    if layer.kind == "fused":
        return _stack(tensors, layer.enabled)
    if layer.kind not in ("conv", "conv_transpose"):
        return tensors
    a, b = tensors[A], tensors[B]
    if layer.kind == "conv" and layer.groups > 1 and a.shape[0] == b.shape[1]:
        a = _spread(a, layer.groups)
    packed = {**tensors, A: a, B: b.view(*b.shape, *[1] * (a.dim() - 2))}
    if MAGNITUDE in tensors:
        packed[MAGNITUDE] = tensors[MAGNITUDE].view(1, -1, *[1] * (a.dim() - 2))
    return packed


def unpack_conv(tensors: Mapping[str, Tensor]) -> LayerState:
    """Return a convolution's state from PEFT's A (R, in, *kernel) and B (out, R/groups, 1...).

    A that holds the same numbers for every group, and zeros elsewhere, becomes (r, in/groups,
    *kernel); any other stays as it is, spanning all input channels.
    """
    a, b = tensors[A], tensors[B].flatten(1)
    groups = a.shape[0] // b.shape[1]
    if groups > 1 and a.shape[1] % groups == 0:
        compact = a[: b.shape[1], : a.shape[1] // groups]
        if torch.equal(_spread(compact, groups), a):
            a = compact.clone()
    magnitude = {MAGNITUDE: tensors[MAGNITUDE].flatten()} if MAGNITUDE in tensors else {}
    return LayerState("conv", {**tensors, A: a, B: b, **magnitude}, groups=groups)


def unstack(layer: LayerState, enabled: Sequence[bool]) -> LayerState:
    """Return the state of a fused layer from its stacked form.

    `layer` comes back unchanged where its shapes or its zeros are not those of such slices.
    """
    a, b, bias = layer.tensors[A], layer.tensors[B], layer.tensors.get(B_BIAS)
    on = [index for index, flag in enumerate(enabled) if flag]
    if (
        layer.kind not in ("linear", "conv1d")
        or not on
        or a.shape[0] % len(on)
        or b.shape[0] % len(enabled)
    ):
        return layer
    rows, r = b.shape[0] // len(enabled), a.shape[0] // len(on)
    tensors = {n: t for n, t in layer.tensors.items() if n.endswith(TRAINED)}
    for place, index in enumerate(on):
        tensors[f"slice_{index}.lora_A"] = a[place * r : (place + 1) * r].clone()
        block = b[index * rows : (index + 1) * rows, place * r : (place + 1) * r]
        tensors[f"slice_{index}.lora_B"] = block.clone()
        if bias is not None:
            tensors[f"slice_{index}.lora_B_bias"] = bias[index * rows : (index + 1) * rows].clone()
    if MAGNITUDE in layer.tensors:
        for index, part in enumerate(torch.split(layer.tensors[MAGNITUDE], rows)):
            tensors[f"slice_{index}.lora_magnitude_vector"] = part.clone()
    fused = replace(layer, kind="fused", tensors=tensors, enabled=tuple(enabled))
    same = all(torch.equal(t, layer.tensors[name]) for name, t in pack(fused).items())
    return fused if same else layer


def _stack(tensors: Mapping[str, Tensor], enabled: Sequence[bool]) -> dict[str, Tensor]:
    slots = [f"slice_{index}" for index, flag in enumerate(enabled) if flag]
    parts = [tensors[f"{slot}.lora_B"] for slot in slots]
    rows = parts[0].shape[0]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[1])
    b = parts[0].new_zeros(rows * len(enabled), ends[-1])
    for slot, part, (start, end) in zip(slots, parts, pairwise(ends), strict=True):
        at = int(slot.removeprefix("slice_")) * rows
        b[at : at + rows, start:end] = part
    packed = {A: torch.cat([tensors[f"{slot}.lora_A"] for slot in slots]), B: b}
    magnitudes = [f"slice_{index}.lora_magnitude_vector" for index in range(len(enabled))]
    if tensors.keys() >= set(magnitudes):
        packed[MAGNITUDE] = torch.cat([tensors[name] for name in magnitudes])
    biases = {slot: tensors.get(f"{slot}.lora_B_bias") for slot in slots}
    if any(bias is not None for bias in biases.values()):
        full = parts[0].new_zeros(b.shape[0])
        for slot, bias in biases.items():
            if bias is not None:
                at = int(slot.removeprefix("slice_")) * rows
                full[at : at + rows] = bias
        packed[B_BIAS] = full
    return packed


def _spread(a: Tensor, groups: int) -> Tensor:
    """Write A (r, in/groups, *kernel) once per group: (r groups, in, *kernel)."""
    r, width = a.shape[:2]
    spread = a.new_zeros(r * groups, width * groups, *a.shape[2:])
    for group in range(groups):
        spread[group * r : (group + 1) * r, group * width : (group + 1) * width] = a
    return spread
