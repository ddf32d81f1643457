"""The names of the tensors in a LayerState, and which are which."""

import re
from dataclasses import replace

from torch import Tensor

from deltaw.state import LayerState, without_twin

A, B, B_BIAS, TRAINED = "weight.lora_A", "weight.lora_B", "weight.lora_B_bias", ".trained"


def copies(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors trained as full copies, by parameter name."""
    return {
        name.removesuffix(TRAINED): tensor
        for name, tensor in layer.tensors.items()
        if name.endswith(TRAINED)
    }


def factors(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors of the low-rank ΔW."""
    return {name: t for name, t in layer.tensors.items() if not name.endswith(TRAINED)}


def plain(layer: LayerState) -> LayerState:
    """Return the layer with a start that is subtracted as part of A and B, of twice the rank."""
    tensors = {n: t for n, t in layer.tensors.items() if ".start_" not in n}
    for name, A0 in layer.tensors.items():
        if name.endswith(".start_A"):
            slot = name.removesuffix(".start_A")
            a, b = f"{slot}.lora_A", f"{slot}.lora_B"
            B0 = layer.tensors[f"{slot}.start_B"]
            tensors[a], tensors[b] = without_twin(tensors[a], tensors[b], A0, B0)
    return replace(layer, tensors=tensors)


def slices(layer: LayerState) -> list[str]:
    """Return the slots of the adapted slices of a fused layer."""
    return [f"slice_{index}" for index, flag in enumerate(layer.enabled) if flag]


def pinned(path: str) -> str:
    """Return the pattern that matches this path alone."""
    return "^" + re.escape(path)
