"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT's files cannot say goes into `deltaw.json`, which PEFT does not look at: the fingerprint
of the base, which slices of a fused layer or slots of an attention are adapted, which parameters a
module's stacks of experts are and how many each holds, and a scale that no `lora_alpha` gives to
the last bit; what a start that is subtracted was goes into
`deltaw_start.safetensors`. Without both the adapter does the same, but for slots of an attention
that PEFT has no form for.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from math import inf, isclose
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, FormatError, printable, raise_all
from deltaw.formats import (
    Misfits,
    _peft_experts,
    _peft_read,
    _peft_side,
    _peft_start,
    _peft_write,
    no_misfits,
)
from deltaw.formats._files import (
    json_bytes,
    not_finite,
    read_json,
    read_tensors,
    replace_files,
    shown,
)
from deltaw.formats._parts import B_BIAS, TOKENS, A, copies, factors, pinned, rows
from deltaw.formats._peft_attention import (
    OUTPUT,
    SLOTS,
    Layers,
    apart,
    owner,
    ranks_of,
    together,
)
from deltaw.formats._peft_keys import EMBEDDING, LINEAR, Found, in_shape, key, layout
from deltaw.formats._peft_layers import pack, unpack_conv
from deltaw.formats._peft_tokens import SUFFIX, ids_of, with_ids
from deltaw.patterns import pattern_values
from deltaw.state import LayerState, State, plain, with_scales

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")


def sniff(path: Path | str) -> bool:
    """Tell whether `path` is a folder with an `adapter_config.json`, or a tensor file in one."""
    return os.path.isfile(_folder(path) / CONFIG)


def read(path: Path | str, misfits: Misfits = no_misfits, *, finite: bool = True) -> State:
    """Read an adapter folder; which layers it adapts is told from the tensors alone.

    `misfits` returns what does not fit the model, from the shapes alone; `finite` refuses NaN and
    Inf.

    Raises:
        FormatError: listing all that is missing, unexpected or misshapen, or not supported.
    """
    folder = _folder(path)
    _need(folder, CONFIG)
    config = _peft_read.parse(folder / CONFIG, read_json(folder / CONFIG))
    file = _need(folder, *TENSORS)
    found: dict[str, Found] = {}
    side = _peft_side.read(folder)
    slots = {path: note.slots for path, note in side.notes.items() if note.slots}

    def check(header: Mapping[str, Tensor]) -> None:
        places, problems = layout(header, config)
        shapes = {p: with_ids(p, in_shape(place, header), config) for p, place in places.items()}
        problems += misfits(State(config, together(shapes, slots)))
        base = config.base_model_name_or_path
        raise_all(
            FormatError,
            f"{shown(file)} is not an adapter that can be used here:",
            problems,
            f"use the base model that it was trained on ({printable(base)})." if base else "",
        )
        found.update(places)

    tensors = read_tensors(file, check, finite)
    layers = _peft_start.restored(together(_layers(found, tensors, config, folder), slots), folder)
    targets = config.target_modules or [
        path for path, at in layers.items() if factors(at) and not config.target_parameters
    ]
    enabled = {pinned(path): at.enabled for path, at in layers.items() if at.kind == "fused"}
    for path, layer in layers.items():
        if layer.kind == "attention":
            enabled[pinned(path)] = tuple(slot in ranks_of(layer) for slot in SLOTS)
    config = replace(config, target_modules=targets, enable_lora=enabled or None)
    return State(config, layers, side.base)


def write(state: State, path: Path | str) -> None:
    """Write the adapter as a folder that PEFT loads; the same state gives the same bytes.

    Layers are named by their whole paths, ΔW of fused slices is padded with zeros, and A of a
    convolution with groups is repeated for each group; stacked experts lie as PEFT
    packs them. A local path of the base is not written.

    Raises:
        FormatError: listing all that PEFT's format cannot hold; nothing is written then.
        DeltawError: if the folder cannot be written; what was there is unchanged.
    """
    raise_all(FormatError, "PEFT's format cannot hold this adapter:", _problems(state))
    start = _peft_start.kept(state)
    state = replace(state, layers={p: plain(layer) for p, layer in sorted(state.layers.items())})
    config = state.config
    counts = {path: _peft_experts.counts_of(layer) for path, layer in state.layers.items()}
    alone, places, stacked = _peft_experts.spread(state.layers)
    state = replace(state, layers=alone)
    linear = apart(alone)
    packed = {path: pack(layer) for path, layer in linear.items() if factors(layer)}
    attentions = [path for path, layer in alone.items() if ranks_of(layer)]
    ranks = {owner(path, attentions): t[A].shape[0] for path, t in packed.items()} | stacked
    alphas = {
        path: _peft_write.alpha_for(config, state.layers[path].scale, r)
        for path, r in ranks.items()
    }
    kinds = {layer.kind for layer in state.layers.values()}
    fan_in_fan_out = not kinds & {"linear", "experts"} and (
        "conv1d" in kinds or config.fan_in_fan_out
    )
    notes = {}
    for name, layer in state.layers.items():
        exact = name not in ranks or config.scale(ranks[name], alphas[name]) == layer.scale
        conv1d = layer.kind == "conv1d" and not fan_in_fan_out
        scale, slots = None if exact else layer.scale, ranks_of(layer)
        notes[name] = _peft_side.Note(() if slots else layer.enabled, conv1d, scale, slots)
    for name, own in counts.items():
        if own:
            notes[name] = _peft_side.Note(stacks=tuple(own.items()))
    saved = [
        path
        for path, layer in alone.items()
        if path not in places
        and _is_head(layer, config)
        and path.removesuffix(".out_proj") not in attentions
    ]
    settings = _peft_write.render(
        config,
        ranks,
        alphas,
        _peft_write.heads(config, saved, ranks),
        fan_in_fan_out,
        any(B_BIAS in tensors for tensors in packed.values()),
        list(stacked),
        ids_of(alone),
    )
    contents = {
        TENSORS[0]: save(_named(state, linear, packed, places), metadata={"format": "pt"}),
        CONFIG: json_bytes(settings),
        _peft_side.NAME: _peft_side.Side(state.base, notes).content(),
        **({_peft_start.NAME: save(_on_cpu(start), metadata={"format": "pt"})} if start else {}),
    }
    replace_files(Path(path), contents)


def _folder(path: Path | str) -> Path:
    path = Path(path)
    return path.parent if path.name in TENSORS and os.path.isfile(path) else path


def _need(folder: Path, *names: str) -> Path:
    """Return the first of these files that is there, or raise an error that says what is not."""
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    if not os.path.isdir(folder):
        raise FormatError(
            f"There is no folder {shown(folder)}.\nFix: check the path of the adapter."
        )
    nested = ", ".join(repr(config.parent.name) for config in sorted(folder.glob(f"*/{CONFIG}")))
    raise FormatError(
        f"{shown(folder)} has no {' or '.join(names)}, which an adapter folder of PEFT's holds."
        + (f"\nFix: name one of the adapters below it: {nested}." if nested else "")
    )


def _layers(
    found: Mapping[str, Found], tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path
) -> dict[str, LayerState]:
    paths = sorted(found)
    notes = _peft_side.read(folder).notes
    attentions = {path for path in found if path + OUTPUT in found}
    attentions |= {path for path, note in notes.items() if note.slots}
    try:
        owners = [owner(path, attentions) for path in paths]
        alphas = pattern_values(config.alpha_pattern, owners, config.lora_alpha or 1)
    except ConfigError as problem:
        raise FormatError(f"{shown(folder / CONFIG)}: alpha_pattern: {problem}") from problem
    layers = {}
    for path, own_path, alpha in zip(paths, owners, alphas, strict=True):
        place = found[path]
        own = {name: tensors[key_] for name, key_ in sorted(place.keys.items())}
        if place.kind == "conv":
            layer = unpack_conv(own)
        elif place.kind == "linear" and config.fan_in_fan_out:
            layer = LayerState("conv1d", own)
        else:
            layer = LayerState(place.kind, own)
        if A in own:
            layer = replace(layer, scale=config.scale(own[A].shape[0], alpha))
        layer = with_ids(path, layer, config)
        layer = notes[own_path].apply(layer) if own_path in notes else layer
        layers[path] = _by_parameter(path, layer, notes, config)
    return layers


def _by_parameter(
    path: str, layer: LayerState, notes: Mapping[str, _peft_side.Note], config: LoraConfig
) -> LayerState:
    """Return stacked experts by the names of their parameters, where a note tells these."""
    counts = dict(notes[path].stacks) if path in notes else {}
    if not counts or not _peft_experts.is_packed(layer):
        return layer
    named, problems = _peft_experts.told_apart(path, layer, counts, config)
    if problems:
        return layer
    scales = {slot: named.scale_of(slot) for slot in counts}
    exact = {slot: notes.get(f"{path}.{slot}", _peft_side.Note()).scale for slot in counts}
    scales |= {slot: own for slot, own in exact.items() if own and isclose(own, scales[slot])}
    return with_scales(named, scales)


def _problems(state: State) -> list[str]:
    """List all that keeps PEFT's format from holding the state."""
    problems = [] if state.layers else ["it is empty"]
    for path, layer in state.layers.items():
        own = factors(layer)
        parts = {name.rpartition(".")[2] for name in own}
        if layer.factored:
            problems.append(f"{path!r}: loralib's factors of a convolution have no form in PEFT")
        elif own and (layer.kind == "module" or not {"lora_A", "lora_B"} <= parts):
            problems.append(f"{path!r}: no layer of PEFT's has {', '.join(map(repr, own))}")
        elif layer.kind == "embedding" and "lora_B_bias" in parts:
            problems.append(f"{path!r}: PEFT knows no bias on B of an embedding")
        elif own and "weight" in copies(layer):
            problems.append(f"{path!r}: its weight is trained in full and adapted as well")
        if layer.kind == "experts" and any(name[0].isdigit() for name in own):
            problems.append(f"{path!r}: its parameters have no names; load it onto its base first")
        if own and not 0 < layer.scale < inf:
            problems.append(f"{path!r}: the scale is {layer.scale}, not above 0")
        problems += [f"{path!r}: {text}" for text in not_finite(layer.tensors)]
    return problems


def _is_head(layer: LayerState, config: LoraConfig) -> bool:
    """Tell whether PEFT needs the module named in `modules_to_save`."""
    if rows(layer):
        return False
    only_biases = config.bias == "all" and all(name.endswith("bias") for name in copies(layer))
    return not factors(layer) and not only_biases


def _named(
    state: State,
    linear: Layers,
    packed: Mapping[str, Mapping[str, Tensor]],
    places: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return the tensors by their keys in the file."""
    named: dict[str, Tensor] = {}
    for path, tensors in packed.items():
        suffixes = EMBEDDING if linear[path].kind == "embedding" else LINEAR
        place = places.get(path, path)
        named |= {key(place, suffixes[name]): tensor for name, tensor in tensors.items()}
    for path, layer in state.layers.items():
        outer = path.removesuffix(".out_proj")
        place = outer + OUTPUT if outer + OUTPUT in packed and outer != path else path
        place = f"{place}.base_layer" if place in packed else places.get(path, place)
        named |= {key(place, name): tensor for name, tensor in copies(layer).items()}
        if TOKENS in layer.tensors:
            named[key(place, SUFFIX)] = layer.tensors[TOKENS]
    return _on_cpu(named)


def _on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: named[name].detach().to("cpu", copy=True).contiguous() for name in sorted(named)}
