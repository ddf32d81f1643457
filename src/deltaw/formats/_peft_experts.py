"""Stacked experts as PEFT stores them: one wrapper of the module for each parameter.

The parameter that comes last in the module has the outermost wrapper; each other one is a
`base_layer` further in. A (E, r, in) is written as (E r, in), expert by expert, and B (E, out, r)
as (out, E r), the expert changing fastest. The file says neither the parameters' order nor E.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.formats._parts import A, B, factors
from deltaw.patterns import pattern_value
from deltaw.state import LayerState, with_scales

Counts = Mapping[str, int]
"""The adapted parameters of a module in its own order, with the experts of each; 0: a matrix."""


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


def counts_of(layer: LayerState) -> Counts:
    """Return the adapted parameters of stacked experts; nothing for other layers."""
    if layer.kind != "experts" or is_packed(layer):
        return {}
    factors_A = {slot: layer.tensors[f"{slot}.lora_A"] for slot in slots_of(layer)}
    return {slot: len(a) if a.dim() == 3 else 0 for slot, a in factors_A.items()}


def is_packed(layer: LayerState) -> bool:
    """Tell whether a layer may hold parameters as a file does: numbered, or one without a name."""
    slots = slots_of(layer)
    if layer.kind == "experts":
        return bool(slots) and all(slot.isdigit() for slot in slots)
    return layer.kind == "linear" and slots == ["weight"]


def told_apart(
    path: str, layer: LayerState, counts: Counts, config: LoraConfig
) -> tuple[LayerState, list[str]]:
    """Return the packed factors of a module by the names of its parameters, and what does not fit.

    A file numbers them from the last parameter of the module on.
    """
    packed = slots_of(layer)
    if len(counts) != len(packed):
        return layer, [
            f"{path}: the file has factors of {len(packed)} parameters, and target_parameters "
            f"takes {', '.join(counts) or 'none'}"
        ]
    tensors = {n: t for n, t in layer.tensors.items() if n.rpartition(".")[0] not in packed}
    scales, problems = {}, []
    for (name, count), slot in zip(counts.items(), sorted(packed, key=_last_first), strict=True):
        full = f"{path}.{name}"
        r = pattern_value(config.rank_pattern, full, config.r)
        alpha = pattern_value(config.alpha_pattern, full, config.lora_alpha or 1)
        a, b = layer.tensors[f"{slot}.lora_A"], layer.tensors[f"{slot}.lora_B"]
        scales[name] = config.scale(r, alpha)
        if {a.shape[0], b.shape[-1]} == {r * max(count, 1)}:
            a, b = _unpacked(a, b, count)
        else:
            problems.append(
                f"{full}: the file has rank {a.shape[0]} in all, the model needs {max(count, 1)} "
                f"x {r}"
            )
        tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    return with_scales(replace(layer, kind="experts", tensors=tensors), scales), problems


def _unpacked(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return A (E, r, in) and B (E, out, r) of a file's A (E r, in) and B (out, E r)."""
    if not count:
        return a, b
    into, out = a.shape[1], b.shape[0]
    return a.reshape(count, -1, into), b.reshape(out, -1, count).permute(2, 0, 1).contiguous()


def _last_first(slot: str) -> int:
    return -int(slot) if slot.isdigit() else 0
