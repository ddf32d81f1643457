"""Stacked experts as PEFT stores them: one wrapper of the module for each parameter.

The parameter that comes last in the module has the outermost wrapper; each other one is a
`base_layer` further in. A (E, r, in) is written as (E r, in), expert by expert, and B (E, out, r)
as (out, E r), the expert changing fastest.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from deltaw.formats._parts import A, B, factors
from deltaw.state import LayerState


def spread(
    layers: Mapping[str, LayerState],
) -> tuple[dict[str, LayerState], dict[str, str], dict[str, int]]:
    """Return every parameter as a layer of its own, by its path, with its place and its rank.

    Other layers stay as they are; those without a place of their own lie where they are.
    """
    alone: dict[str, LayerState] = {}
    places: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        if layer.kind != "experts":
            alone[path] = layer
            continue
        slots = slots_of(layer)
        for depth, slot in enumerate(reversed(slots)):
            name = f"{path}.{slot}"
            a, b = layer.tensors[f"{slot}.lora_A"], layer.tensors[f"{slot}.lora_B"]
            tensors = {A: a.flatten(0, -2), B: packed(b)}
            alone[name] = LayerState("experts", tensors, layer.scale_of(slot))
            places[name] = path + ".base_layer" * depth
            ranks[name] = a.shape[-2]
        beside = {n: t for n, t in layer.tensors.items() if n not in factors(layer)}
        if beside:
            alone[path] = replace(layer, kind="module", tensors=beside)
            places[path] = path + ".base_layer" * len(slots)
    return alone, places, ranks


def slots_of(layer: LayerState) -> list[str]:
    """Return the adapted parameters of a module in its own order."""
    return [name.removesuffix(".lora_A") for name in layer.tensors if name.endswith(".lora_A")]


def packed(b: Tensor) -> Tensor:
    """Return B (E, out, r) as (out, E r), and (out, r) as it is."""
    return b if b.dim() == 2 else b.permute(1, 2, 0).flatten(1)
