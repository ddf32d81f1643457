"""Attention as PEFT stores it, and back.

PEFT knows one (A, B) for queries, keys and values together, A (R, width) and B (3 width, R), and
one of the same rank for the output, under `base_layer.out_proj`. Slots of ours are stacked: A of
those that are adapted, B with zeros off the blocks, the output's factors with zeros up to R; slots
with the same A share it. What PEFT's attention cannot be, with keys or values of another width or
under DoRA, is written slot by slot; PEFT refuses such a model or setting by itself.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.formats._parts import B_BIAS, TRAINED, A, B, factors
from deltaw.state import LayerState

SLOTS = ("q", "k", "v", "out")
OUTPUT = ".base_layer.out_proj"
Layers = Mapping[str, LayerState]
Ranks = Mapping[str, int]
"""The adapted slots of an attention, each with its rank."""


def ranks_of(layer: LayerState) -> Ranks:
    """Return the ranks of the slots of an attention; nothing for other layers."""
    if layer.kind != "attention":
        return {}
    own = {slot: layer.tensors.get(f"{slot}.lora_A") for slot in SLOTS}
    return {slot: len(a) for slot, a in own.items() if a is not None}


def apart(layers: Layers) -> dict[str, LayerState]:
    """Return every attention as the linear layers of the file, and other layers as they are."""
    found: dict[str, LayerState] = {}
    for path, layer in layers.items():
        if not ranks_of(layer):
            found[path] = layer
        elif _is_pefts(layer):
            stacked, output = _stacked(layer)
            found |= {path: stacked, path + OUTPUT: output}
        else:
            found |= {f"{path}.{slot}": _alone(layer, slot) for slot in ranks_of(layer)}
    return found


def owner(path: str, attentions: Collection[str]) -> str:
    """Return which of the attentions has a part at `path` of the file; or `path` itself."""
    for outer in (path.removesuffix(OUTPUT), *(path.removesuffix(f".{slot}") for slot in SLOTS)):
        if outer != path and outer in attentions:
            return outer
    return path


def together(layers: Layers, notes: Mapping[str, Ranks]) -> dict[str, LayerState]:
    """Return the layers of a file with the parts of every attention as one.

    Without a note on its slots, or where the tensors are not theirs, q, k and v have the same A.
    """
    found = dict(layers)
    for path, ranks in notes.items():
        own = {slot: found.pop(f"{path}.{slot}") for slot in ranks if f"{path}.{slot}" in found}
        if own:
            first = next(iter(own.values()))
            beside = found.get(path, LayerState("module", {})).tensors
            tensors = {
                name.replace("weight.", f"{slot}.", 1): tensor
                for slot, layer in own.items()
                for name, tensor in layer.tensors.items()
            }
            found[path] = replace(first, kind="attention", tensors={**beside, **tensors})
    for path in [p for p in found if p + OUTPUT in found and {A, B} <= found[p].tensors.keys()]:
        stacked, output = found[path], found[path + OUTPUT]
        if {A, B} <= output.tensors.keys() and stacked.tensors[B].shape[0] % 3 == 0:
            found |= {path: _split(stacked, output, notes.get(path, {}))}
            del found[path + OUTPUT]
            beside = {n: t for n, t in output.tensors.items() if n.endswith(TRAINED)}
            if beside:
                found[f"{path}.out_proj"] = LayerState("module", beside)
    return found


def _is_pefts(layer: LayerState) -> bool:
    """Tell whether all slots have one width, and no magnitude."""
    tensors = factors(layer)
    widths = {t.shape[1] for name, t in tensors.items() if name.endswith("lora_A")}
    widths |= {t.shape[0] for name, t in tensors.items() if name.endswith("lora_B")}
    return len(widths) == 1 and not any("magnitude" in name for name in tensors)


def _alone(layer: LayerState, slot: str) -> LayerState:
    own = {n: t for n, t in factors(layer).items() if n.startswith(f"{slot}.")}
    tensors = {n.replace(f"{slot}.", "weight.", 1): t for n, t in own.items()}
    return LayerState("linear", tensors, layer.scale)


def _stacked(layer: LayerState) -> tuple[LayerState, LayerState]:
    """Return what is for the input projection and what is for the output's, of one rank."""
    tensors, ranks = factors(layer), ranks_of(layer)
    width = next(t for name, t in tensors.items() if name.endswith("lora_B")).shape[0]
    like = next(iter(tensors.values()))
    ours = [slot for slot in SLOTS[:3] if slot in ranks]
    own_A = [tensors[f"{slot}.lora_A"] for slot in ours]
    shared = bool(ours) and all(torch.equal(a, own_A[0]) for a in own_A)
    a = own_A[0] if shared else torch.cat(own_A) if ours else like.new_zeros(0, width)
    b = like.new_zeros(3 * width, len(a))
    start = 0
    for slot in ours:
        row = SLOTS.index(slot) * width
        b[row : row + width, start : start + ranks[slot]] = tensors[f"{slot}.lora_B"]
        start += 0 if shared else ranks[slot]
    none = {A: like.new_zeros(0, width), B: like.new_zeros(width, 0)}
    out = _alone(layer, "out").tensors if "out" in ranks else none
    rank = max(len(a), len(out[A]))
    stacked = {A: _grown(a, rank, 0), B: _grown(b, rank, 1)}
    output = {**out, A: _grown(out[A], rank, 0), B: _grown(out[B], rank, 1)}
    biases = {slot: tensors.get(f"{slot}.lora_B_bias") for slot in SLOTS}
    if any(bias is not None for bias in biases.values()):
        full = [like.new_zeros(width) if bias is None else bias for bias in biases.values()]
        stacked[B_BIAS], output[B_BIAS] = torch.cat(full[:3]), full[3]
    return LayerState("linear", stacked, layer.scale), LayerState("linear", output, layer.scale)


def _grown(tensor: Tensor, rank: int, axis: int) -> Tensor:
    """Return the tensor with zeros up to that size along an axis."""
    more = rank - tensor.shape[axis]
    return F.pad(tensor, (0, 0, 0, more) if axis == 0 else (0, more))


def _split(stacked: LayerState, output: LayerState, ranks: Ranks) -> LayerState:
    """Return the slots that were stacked, or where these are not such, all with the same A."""
    beside = {n: t for n, t in stacked.tensors.items() if n.endswith(TRAINED)}
    wide = {slot: len(stacked.tensors[A]) for slot in SLOTS}
    ours = [slot for slot in SLOTS[:3] if slot in ranks]
    for own, shared in ((ranks, False), (ranks, True), (wide, True)):
        if not own or any(r > wide["out"] for r in own.values()):
            continue
        if not shared and sum(own[slot] for slot in ours) > wide["out"]:
            continue
        slots = _slots(stacked.tensors, output.tensors, own, shared)
        layer = LayerState("attention", slots, stacked.scale)
        if own is wide or stacked.tensors[A].is_meta or _same(layer, stacked, output):
            break
    return replace(layer, tensors={**beside, **slots})


def _same(layer: LayerState, stacked: LayerState, output: LayerState) -> bool:
    """Tell whether a layer is written as these two."""
    pairs = zip(_stacked(layer), (stacked, output), strict=True)
    return all(
        name in other.tensors and torch.equal(t, other.tensors[name])
        for mine, other in pairs
        for name, t in mine.tensors.items()
    )


def _slots(
    stacked: Mapping[str, Tensor], output: Mapping[str, Tensor], ranks: Ranks, shared: bool
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for slot, b in zip(SLOTS, (*stacked[B].chunk(3), output[B]), strict=True):
        if slot not in ranks:
            continue
        source = output if slot == "out" else stacked
        first = 0 if shared or slot == "out" else start
        columns = slice(first, first + ranks[slot])
        start += ranks[slot]
        found[f"{slot}.lora_A"] = source[A][columns].clone()
        found[f"{slot}.lora_B"] = b[:, columns].clone()
        if B_BIAS in source:
            whole = source[B_BIAS]
            bias = whole if slot == "out" else whole.chunk(3)[SLOTS.index(slot)]
            found[f"{slot}.lora_B_bias"] = bias.clone()
    return found
