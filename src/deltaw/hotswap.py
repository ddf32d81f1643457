"""Replacing an adapter by another from disk while everything else stays."""

import torch
from torch import nn

from deltaw.attaching import attach_state, detach
from deltaw.fitting import fit
from deltaw.layer import AdaptedLayer
from deltaw.layers.module import TrainedModule
from deltaw.planning import base_modules
from deltaw.root import require_root
from deltaw.state import State


def swap_in(model: nn.Module, state: State, name: str, trainable: bool) -> None:
    """Put `state` in the place of the adapter `name`, which keeps its part in the active sum.

    Where every tensor has the shape of the one there and none is offloaded, values are copied in
    place and a compiled model is not compiled again; otherwise the adapter is taken off and
    attached anew.
    """
    authority = require_root(model).authority
    authority.require_changeable("swap an adapter")
    active, order = authority.active, list(authority.configs)
    if not _copied_in_place(model, state, name, trainable):
        _replace(model, state, name, trainable)
    authority.configs[name] = state.config
    authority.configs = {key: authority.configs[key] for key in order}
    authority.fingerprints.pop(name, None)
    authority.activate(active)


def _copied_in_place(model: nn.Module, state: State, name: str, trainable: bool) -> bool:
    if require_root(model).authority.configs[name].method != state.config.method:
        return False
    layers = base_modules(model)
    old = {p for p, m in layers.items() if isinstance(m, AdaptedLayer) and name in m.adapter}
    fits, _ = fit(layers, state)
    if old != set(fits):
        return False
    pairs = []
    for path, (geometry, slots) in fits.items():
        layer = layers[path]
        assert isinstance(layer, AdaptedLayer)
        entry = layer.parts(name)
        if geometry not in (TrainedModule, type(layer).mixin):
            return False
        if set(entry) != {fit.slot for fit in slots}:
            return False
        for fit_ in slots:
            adapter = entry[fit_.slot]
            new = fit_.tensors()
            own = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
            if {k: t.shape for k, t in new.items()} != {k: t.shape for k, t in own.items()}:
                return False
            if any(tensor.is_meta for tensor in own.values()):
                return False
            if fit_.trained is None and (
                adapter.scale != fit_.scale or adapter.dropout != state.config.lora_dropout
            ):
                return False
            pairs += [(own[key], tensor) for key, tensor in new.items()]
    with torch.no_grad():
        for target, tensor in pairs:
            target.copy_(tensor)
            if isinstance(target, nn.Parameter):
                target.requires_grad_(trainable)
    return True


def _replace(model: nn.Module, state: State, name: str, trainable: bool) -> None:
    """Attach first under a spare name, so that a failure leaves the old adapter in place."""
    spare = f"{name} (new)"  # No adapter of a user's can have this name.
    attach_state(model, state, spare, trainable, leaving=name, fresh=True)
    detach(model, name)
    authority = require_root(model).authority
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and spare in module.adapter:
            module.adapter[name] = module.adapter.pop(spare)
    authority.configs[name] = authority.configs.pop(spare)
