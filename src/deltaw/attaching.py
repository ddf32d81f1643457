"""Putting an adapter on a model, and taking it off again."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.absorbing import Absorption, absorption_of
from deltaw.adapter import Adapter
from deltaw.adapters import builder_of
from deltaw.authority import Authority
from deltaw.building import Builder
from deltaw.calibrating import Loss, calibration_of
from deltaw.config import LoraConfig
from deltaw.encoders import Stepwise, walk_through
from deltaw.errors import ConfigError, FormatError, StateError, TargetError, raise_all
from deltaw.fingerprint import adapted_weights, fingerprint
from deltaw.fitting import fit, refuse_loaded_as_one, refuse_mixed
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.layers.module import TrainedModule
from deltaw.optimizers import watch
from deltaw.originals import kept_by, restored
from deltaw.planning import base_modules, look, plan
from deltaw.plans import Plan
from deltaw.quant import storage_of
from deltaw.root import adapted_layers, adopt, check_attachable, find_root
from deltaw.serving import USUAL, Serving
from deltaw.starting import as_started, initial_state
from deltaw.state import State
from deltaw.swap import clear_bound_forward, refuse_hidden_names, swap, unswap
from deltaw.walking import walk


def attach(
    model: nn.Module,
    source: LoraConfig | State,
    name: str = "default",
    *,
    generator: torch.Generator | None = None,
    trainable: bool = True,
    strict: bool = True,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    absorb: bool | str = False,
) -> Plan | None:
    """Put an adapter on `model` in place: `W' = W + s B A` in every layer it names.

    The model's own layers stay where they are, under the same names and with the same bits; each
    gets one child module called `adapter`. All parameters of the base are frozen. The first adapter
    becomes the active one; later ones wait for `activate`.

    Args:
        model: the model, on any device.
        source: settings, from which the adapter starts so that the output is bit-identical to the
            base's; or the state of an adapter that was captured or read from a file.
        name: what to call it: letters, digits, `_` and `-`.
        generator: a CPU generator for the starting values.
        trainable: whether its parameters have `requires_grad`.
        strict: raise where an entry of the settings matches nothing, instead of a warning in the
            plan.
        data: batches for the starts from data (`eva`, `lora_ga`), read once: each a mapping of
            keyword arguments, a tuple or list of positional ones, or one tensor, where the model
            runs.
        loss: runs the model on a batch and returns its loss, as in `loss(model, batch)`; None
            gives the batch to the model and takes the output's `loss`.
        absorb: take a start that is not zero out of the weights, as its paper does, instead of
            subtracting it beside them: True writes `W - s B0 A0` in the form that W has (rounded
            once, or packed again); a kind of `deltaw.quantize`, on a model in full precision,
            packs it (QPiSSA, arXiv 2404.02948; LoftQ, arXiv 2310.08659). Layers without an adapter
            stay as they are; `deltaw.quantize` packs them afterwards. The output is then the
            base's up to rounding and not to the bit, and the base's weights are gone: no
            `detach`, `disabled` or second adapter until it is loaded again. What is saved is an
            adapter of the base as it was; loaded with the same `absorb` it gives the same bits.

    Returns:
        What was adapted, for a config; None for a state.

    Raises:
        ConfigError: if the name cannot be used, or the source is neither of both; if there is no
            such start, or it needs data that are not there; listing every layer that it cannot
            start; if `absorb` has no effect, or listing every weight that it cannot change.
        TargetError: listing what matches nothing or cannot be adapted.
        FormatError: listing every tensor of the state that does not fit the model.
        StateError: if the name is taken, the adapters are merged, or the model is a `DataParallel`.
    """
    check_attachable(model, name)
    _require_source(source)
    absorption = absorption_of(absorb, source)
    calibration = calibration_of(source, data, loss)
    if isinstance(source, LoraConfig):
        known = source.base_model_name_or_path or getattr(model, "name_or_path", None) or None
        if known and Path(known).is_dir():
            # The whole path stays a path wherever the process goes, and is no name on the hub.
            known = str(Path(known).resolve())
        source = dataclasses.replace(source, base_model_name_or_path=known)
        made = plan(model, source, strict=strict)
        state = initial_state(model, made, generator, calibration, absorption)
        attach_state(model, state, name, trainable, fresh=True, absorption=absorption)
        return as_started(made, state)
    attach_state(model, source, name, trainable, absorption=absorption)
    return None


@torch.inference_mode(False)
def attach_state(
    model: nn.Module,
    state: State,
    name: str,
    trainable: bool,
    leaving: str | None = None,
    fresh: bool = False,
    serving: Serving = USUAL,
    absorption: Absorption | None = None,
) -> None:
    """Put the adapter `state` on `model` under `name`, or raise and change nothing.

    The adapter `leaving` is about to be detached, and need not share layers with the new one. The
    tensors of a `fresh` state become the adapter's own; those of others are copied.
    """
    layers = base_modules(model)
    fits, problems = fit(layers, state, trainable or absorption is not None)
    raise_all(
        FormatError,
        f"The adapter does not fit {type(model).__name__}:",
        problems,
        "use the base model that the adapter was trained on.",
    )
    refuse_mixed(layers, fits, leaving)
    refuse_loaded_as_one(model, fits)
    builder_of(state.config.method)
    serving.require_possible(state.config, fits, trainable)
    if absorption is not None:
        absorption.require_storable(model, layers, fits)
    rebinds = []
    for path, (geometry, _) in fits.items():
        refuse_hidden_names(layers[path], geometry, path)
        rebinds.append(clear_bound_forward(layers[path], path))
    builder = Builder(state.config, trainable, fresh, serving, absorption is not None)
    built: dict[str, dict[str, Adapter]] = {}
    for path, (geometry, slots) in fits.items():
        layer = look(layers[path], geometry)
        try:
            built[path] = {s.slot: builder.build(layer, s) for s in slots}
        except TargetError as problem:
            problems.append(f"{path}: {problem}")
    raise_all(
        TargetError,
        f"These layers cannot be adapted by method={state.config.method!r}:",
        problems,
        "take them out with exclude_modules.",
    )
    authority = adopt(model).authority
    _freeze(layers, authority)
    if absorption is not None:
        authority.fingerprints[name] = fingerprint(model, adapted_weights(state.layers))
        absorption.apply(layers, fits)
        authority.absorbed = True
    for path, (geometry, _) in fits.items():
        _equip(layers[path], geometry, built[path], name, authority)
    for rebind in rebinds:
        rebind()
    walk_through(model)
    authority.add(name, state.config)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off `model`, or all of them; with the last one the model is its old self.

    The base's bits, classes and `requires_grad` flags are what they were before `attach`.

    Raises:
        StateError: if there is no such adapter; if it is merged and `unmerge` can give the
            originals back (where it no longer can, the model keeps the weights it has); or if its
            start was absorbed and it is not merged for good.
        TargetError: if a layer that would be left without adapters has a `forward` of its own.
    """
    root = find_root(model)
    configs = root.authority.configs if root is not None else {}
    if root is None or (name is not None and name not in configs):
        have = ", ".join(configs) or "none"
        raise StateError(f"There is no adapter {name or ''!r} to detach. Adapters: {have}.")
    authority, layers = root.authority, adapted_layers(root)
    authority.require_shared("detach")
    if authority.merged is None:
        authority.require_base("detach")
    elif name is not None:
        authority.require_unmerged("detach one adapter alone")
    kept = kept_by(layers)
    if kept and not restored(kept)[1]:
        raise StateError(
            "Cannot detach: the weights are merged and their originals are kept.\n"
            "Fix: call deltaw.unmerge(model) first; to keep the merged weights, then merge again "
            'with original="none".'
        )
    leaving = [name] if name is not None else list(authority.configs)
    bare = {p: layer for p, layer in layers.items() if {*layer.adapter} <= {*leaving}}
    rebinds = [clear_bound_forward(layer, path) for path, layer in bare.items()]
    authority.merged = None
    for gone in leaving:
        for layer in layers.values():
            if gone in layer.adapter:
                del layer.adapter[gone]
        authority.remove(gone)
    for layer, rebind in zip(bare.values(), rebinds, strict=True):
        _strip(layer)
        rebind()
    if not authority.configs:
        thawed = authority.thawed
        if authority.absorbed:
            thawed = thawed - {f"{p}.{WEIGHT}" for p, m in walk(root) if storage_of(m)}
        for path, module in walk(root):
            for own, parameter in module._parameters.items():
                if parameter is not None and f"{path}.{own}".lstrip(".") in thawed:
                    parameter.requires_grad_(True)
        del root.authority
        for module in root.modules():
            if isinstance(module, Stepwise):
                unswap(module)
    walk_through(root)


def _require_source(source: object) -> None:
    """Raise where the source is of another type, naming what takes that."""
    if isinstance(source, (LoraConfig, State)):
        return
    fix = "import LoraConfig from deltaw, or it and get_peft_model from deltaw.compat.peft."
    if isinstance(source, (str, Path)):
        fix = "deltaw.load(model, path) reads an adapter from a folder or file."
    elif isinstance(source, Mapping):
        fix = "deltaw.LoraConfig(**settings) takes settings by name."
    kind = f"{type(source).__module__}.{type(source).__name__}".removeprefix("builtins.")
    raise ConfigError(f"attach takes a deltaw.LoraConfig or State, not a {kind}.\nFix: {fix}")


def _freeze(layers: dict[str, nn.Module], authority: Authority) -> None:
    for path, layer in layers.items():
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.requires_grad:
                authority.thawed.add(f"{path}.{name}" if path else name)
                parameter.requires_grad_(False)
                watch(parameter)


def _equip(
    layer: nn.Module,
    geometry: type[AdaptedLayer],
    modules: dict[str, Adapter],
    name: str,
    authority: Authority,
) -> None:
    """Swap the class of one layer and give it the adapter's modules."""
    if geometry is TrainedModule and isinstance(layer, AdaptedLayer):
        geometry = type(layer).mixin  # type: ignore[assignment]
    read = (slot for slot, module in modules.items() if geometry.overrides(slot, module))
    overridden = tuple(sorted(read))
    swap(layer, geometry, overridden)
    assert isinstance(layer, AdaptedLayer)
    if "adapter" not in layer._modules:
        layer.authority = authority
        layer.originals = {}
        layer.storage = storage_of(layer)
        if layer.storage is not None:
            layer.storage.settle(layer)
        layer.adapter = nn.ModuleDict()
    layer.adapter[name] = nn.ModuleDict(modules)
    layer.adapter[name].train(layer.training)


def _strip(layer: AdaptedLayer) -> None:
    """Give one layer its own class back."""
    del layer.adapter
    del layer.authority
    del layer.originals
    del layer.storage
    unswap(layer)
