"""From a plan to the state an adapter starts in."""

import functools

import torch
from torch import Tensor, nn

from deltaw.inits import Site, start_of
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
    states = {t.path: _low_rank(layers[t.path], t, plan, generator) for t in plan.targets}
    for row in plan.trained:
        copies = {f"{name}.trained": stored(layers[row.path], name) for name in row.names}
        old = states.get(row.path, LayerState("module", {}))
        states[row.path] = LayerState(
            old.kind, {**old.tensors, **copies}, old.scale, old.enabled, old.groups
        )
    return State(plan.config, states)


def _low_rank(
    module: nn.Module, target: Target, plan: Plan, generator: torch.Generator | None
) -> LayerState:
    geometry = geometry_of(module)
    assert geometry is not None
    layer = look(module, geometry)
    begin = start_of(plan.config.init_lora_weights)
    meta = device_of(module).type == "meta"
    tensors: dict[str, Tensor] = {}
    for slot, shape in zip(target.slots, target.shapes, strict=True):
        if meta:
            A = torch.empty(target.r, shape[1], device="meta")
            B = torch.empty(shape[0], target.r, device="meta")
        else:
            site = Site(
                shape,
                target.r,
                target.scale,
                layer.zero_factor,
                generator,
                functools.partial(layer.matrix, slot),
            )
            A, B = begin(site)
        tensors[f"{slot}.lora_A"], tensors[f"{slot}.lora_B"] = layer.pack(A, B)
        if plan.config.lora_bias:
            tensors[f"{slot}.lora_B_bias"] = torch.zeros(shape[0], device=A.device)
    groups = getattr(module, "groups", 1)
    return LayerState(target.kind, tensors, target.scale, target.enabled, groups)
