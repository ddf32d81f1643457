"""Replacing an adapter by another from disk while everything else stays."""

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter
from deltaw.adapters._reserved import ReservedLora
from deltaw.adapters.lora import LoraAdapter
from deltaw.attaching import attach_state, detach
from deltaw.errors import StateError, raise_all
from deltaw.fitting import Fit, Fits, fit
from deltaw.layer import AdaptedLayer
from deltaw.layers.module import TrainedModule
from deltaw.root import require_root
from deltaw.serving import USUAL, Serving
from deltaw.state import State

Places = dict[tuple[str, str], Adapter]
"""The adapter's modules by path and slot."""


def swap_in(
    model: nn.Module,
    layers: dict[str, nn.Module],
    state: State,
    name: str,
    trainable: bool,
    serving: Serving,
) -> None:
    """Put `state` in the place of the adapter `name`, which keeps its part in the active sum.

    `layers` are the modules of the base by path. Where every tensor has the shape of the one there,
    or there is a reserve, and none is offloaded, values are copied in place; a compiled model is
    not compiled again but for another scale without a reserve. Otherwise the adapter is taken off
    and attached anew.

    Raises:
        StateError: listing what a reserve has no room for; nothing is changed.
    """
    authority = require_root(model).authority
    authority.require_changeable("swap an adapter")
    active, order = authority.active, list(authority.configs)
    places = _places(layers, name)
    fits, _ = fit(layers, state, trainable)
    alike = _same_geometry(layers, fits) and all(map(_is_here, places.values()))
    same_method = authority.configs[name].method == state.config.method
    lean = _lean_dtype(places)
    if any(isinstance(place, ReservedLora) for place in places.values()):
        problems = ["it would be trained"] if trainable else []
        problems += ["reserve and dtype were given again"] if serving != USUAL else []
        problems += [f"its method is {state.config.method}"] if not same_method else []
        problems += ["the adapter that is there is offloaded, or reads W otherwise"] * (not alike)
        _require_room(_by_place(fits), places, problems)
    asked = serving != USUAL or (trainable and lean is not None)
    fitting = alike and same_method and not asked
    if not (fitting and _copied_in_place(_by_place(fits), state, places, trainable)):
        kept = Serving(dtype=None if trainable else lean)
        _replace(model, state, name, trainable, serving if asked else kept)
    authority.configs[name] = state.config
    authority.configs = {key: authority.configs[key] for key in order}
    authority.fingerprints.pop(name, None)
    authority.activate(active)


def _places(layers: dict[str, nn.Module], name: str) -> Places:
    adapted = {path: m for path, m in layers.items() if isinstance(m, AdaptedLayer)}
    return {(p, slot): part for p, m in adapted.items() for slot, part in m.parts(name).items()}


def _lean_dtype(places: Places) -> torch.dtype | None:
    """Return the dtype of factors that are kept in less than float32."""
    factors = [place.lora_A for place in places.values() if isinstance(place, LoraAdapter)]
    return next((A.dtype for A in factors if A.element_size() < 4), None)


def _copied_in_place(
    found: dict[tuple[str, str], Fit], state: State, places: Places, trainable: bool
) -> bool:
    reserved = any(isinstance(place, ReservedLora) for place in places.values())
    if not reserved and places.keys() != found.keys():
        return False
    if not all(_fits_into(places[key], new) for key, new in found.items()):
        return False
    for key, place in places.items():
        _put(place, found.get(key), state.config.lora_dropout)
        place.requires_grad_(trainable)
    return True


def _by_place(fits: Fits) -> dict[tuple[str, str], Fit]:
    return {(path, one.slot): one for path, (_, slots) in fits.items() for one in slots}


def _same_geometry(layers: dict[str, nn.Module], fits: Fits) -> bool:
    return all(
        geometry is TrainedModule or geometry is getattr(type(layers[path]), "mixin", None)
        for path, (geometry, _) in fits.items()
    )


def _is_here(place: Adapter) -> bool:
    return not any(p.is_meta for p in (*place.parameters(), *place.buffers()))


def _fits_into(place: Adapter, new: Fit) -> bool:
    shapes = {name: tensor.shape for name, tensor in new.tensors().items()}
    own = {n: t.shape for n, t in (*place.named_parameters(), *place.named_buffers())}
    if isinstance(place, ReservedLora):
        return shapes.keys() == own.keys()
    return shapes == own


@torch.no_grad()
def _put(place: Adapter, new: Fit | None, dropout: float) -> None:
    if isinstance(place, ReservedLora):
        if new is None:
            place.clear()
            return
        assert new.A is not None and new.B is not None
        place.put(new.A, new.B, new.scale, new.bias)
    elif new is not None:
        own: dict[str, Tensor] = dict(place.named_parameters()) | dict(place.named_buffers())
        for name, tensor in new.tensors().items():
            own[name].copy_(tensor)
    if isinstance(place, LoraAdapter) and new is not None:
        place.scale, place.dropout = new.scale, dropout


def _require_room(found: dict[tuple[str, str], Fit], places: Places, problems: list[str]) -> None:
    """Raise where a reserved adapter has no room for what comes, or there are problems already."""
    for (path, slot), new in found.items():
        place, where = places.get((path, slot)), path if slot == "weight" else f"{path} {slot}"
        if place is None:
            problems.append(f"{where}: the adapter that is there has no part in it")
        elif isinstance(place, ReservedLora) and new.A is None:
            problems.append(f"{where}: trained in full, and not by factors")
        elif isinstance(place, ReservedLora) and new.A is not None:
            if new.A.shape[0] > place.reserve:
                problems.append(f"{where}: rank {new.A.shape[0]}, reserved are {place.reserve}")
            if (new.bias is None) != (place.lora_B_bias is None):
                problems.append(f"{where}: one of both has a bias on B, the other has none")
    problems += [
        f"{'.'.join(key)}: is trained in full, and the new adapter has none of it"
        for key, place in places.items()
        if key not in found and not isinstance(place, ReservedLora)
    ]
    raise_all(
        StateError,
        "The reserved adapter has no room for this one:",
        problems,
        "detach it and load the new one with a larger reserve; a compiled model compiles again.",
    )


def _replace(model: nn.Module, state: State, name: str, trainable: bool, serving: Serving) -> None:
    """Attach first under a spare name, so that a failure leaves the old adapter in place."""
    spare = f"{name} (new)"  # No adapter of a user's can have this name.
    attach_state(model, state, spare, trainable, leaving=name, fresh=True, serving=serving)
    detach(model, name)
    authority = require_root(model).authority
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and spare in module.adapter:
            module.adapter[name] = module.adapter.pop(spare)
    authority.configs[name] = authority.configs.pop(spare)
