"""From a plan to the state an adapter starts in."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from deltaw.inits import Site, starts
from deltaw.layer import WEIGHT, AdaptedLayer
from deltaw.layers import geometry_of
from deltaw.offload import device_of, stored
from deltaw.planning import Plan, Target, base_modules, look
from deltaw.state import LayerState, State


def initial_state(model: nn.Module, plan: Plan, generator: torch.Generator | None = None) -> State:
    """Return the factors at their start and the copies of what is trained in full.

    Args:
        model: the model that `plan` was made for.
        plan: what is adapted.
        generator: a CPU generator; the same seed gives the same factors whatever else ran, in any
            dtype and on any device of the model. None draws from torch's global one.
    """
    layers = base_modules(model)
    name = plan.config.init_lora_weights
    places = [(t, look_at(layers[t.path])) for t in plan.targets]
    real = [(t, layer) for t, layer in places if device_of(layer).type != "meta"]
    sites = [site for t, layer in real for site in _sites(t, layer, generator)]
    factors = iter(starts(name, sites))
    states = {}
    for target, layer in places:
        if device_of(layer).type == "meta":
            pairs = [_empty(target.r, *shape) for shape in target.shapes]
        else:
            pairs = [next(factors) for _ in target.slots]
        tensors = _tensors(target, layer, pairs, twin=isinstance(name, str))
        if plan.config.lora_bias:
            tensors |= {
                f"{slot}.lora_B_bias": torch.zeros(shape[0], device=pairs[0][0].device)
                for slot, shape in zip(target.slots, target.shapes, strict=True)
            }
        groups = getattr(layer, "groups", 1)
        states[target.path] = LayerState(target.kind, tensors, target.scale, target.enabled, groups)
    for row in plan.trained:
        copies = {f"{name}.trained": stored(layers[row.path], name) for name in row.names}
        old = states.get(row.path, LayerState("module", {}))
        states[row.path] = replace(old, tensors={**old.tensors, **copies})
    return State(plan.config, states)


def look_at(module: nn.Module) -> AdaptedLayer:
    """Return the module as the layer that it would be if it were adapted."""
    geometry = geometry_of(module)
    assert geometry is not None
    return look(module, geometry)


def _sites(
    target: Target, layer: AdaptedLayer, generator: torch.Generator | None
) -> Iterator[Site]:
    for slot, shape in zip(target.slots, target.shapes, strict=True):
        where = target.path if slot == WEIGHT else f"{target.path} {slot}"
        matrix = functools.partial(layer.matrix, slot)
        yield Site(where, shape, target.r, target.scale, layer.zero_factor, generator, matrix)


def _empty(r: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    return torch.empty(r, into, device="meta"), torch.empty(out, r, device="meta")


def _tensors(
    target: Target, layer: AdaptedLayer, pairs: Sequence[tuple[Tensor, Tensor]], twin: bool
) -> dict[str, Tensor]:
    """Return the factors of all slots, and those of a start that is subtracted beside them."""
    tensors: dict[str, Tensor] = {}
    for slot, factors in zip(target.slots, pairs, strict=True):
        A, B = layer.pack(*factors)
        tensors |= {f"{slot}.lora_A": A, f"{slot}.lora_B": B}
        if twin and not A.is_meta and A.any() and B.any():
            tensors |= {f"{slot}.start_A": A.clone(), f"{slot}.start_B": B.clone()}
    return tensors
