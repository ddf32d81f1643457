"""From a plan to the state an adapter starts in."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from deltaw import calibrating
from deltaw.absorbing import Absorption
from deltaw.calibrating import Calibration
from deltaw.errors import ConfigError, TargetError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.inits import Factors, Run, Site, from_data, kind_of, refusal, starts, variant_of
from deltaw.kernels.merge import is_finite
from deltaw.layer import AdaptedLayer
from deltaw.layers import geometry_of
from deltaw.layers.experts import Experts
from deltaw.offload import device_of, stored
from deltaw.planning import base_modules, look
from deltaw.plans import Plan, Target
from deltaw.state import IDS, ROWS, LayerState, State, with_scales

Places = Sequence[tuple[Target, AdaptedLayer]]
FROM_WEIGHTS = ("from_weights", "from_packed")
"""The kinds of starts that read nothing but W."""


def initial_state(
    model: nn.Module,
    plan: Plan,
    generator: torch.Generator | None = None,
    calibration: Calibration | None = None,
    absorption: Absorption | None = None,
) -> State:
    """Return the factors at their start and the copies of what is trained in full.

    Args:
        model: the model that `plan` was made for.
        plan: what is adapted.
        generator: a CPU generator; the same seed gives the same factors whatever else ran, in any
            dtype and on any device of the model. None draws from torch's global one.
        calibration: what a start from data starts from.
        absorption: how the start will be taken out of the weights, if it will.

    Raises:
        ConfigError: if there is no such start, or listing every layer that it cannot start, or
            whose weight cannot change as `absorption` asks.
    """
    layers = base_modules(model)
    name = plan.config.init_lora_weights
    places = [(target, look_at(layers[target.path], target.kind)) for target in plan.targets]
    sites = {
        target.name: list(_sites(target, layer, generator, variant_of(name), absorption))
        for target, layer in places
    }
    if absorption is not None:
        slots = ((target.path, layer, target.slots) for target, layer in places)
        absorption.require_possible(model, slots)
    _refuse(name, places, sites, absorbed=absorption is not None)
    run = _run(model, name, places, sites, layers, calibration)
    real = [target.name for target, layer in places if device_of(layer).type != "meta"]
    factors = iter(starts(name, [site for key in real for site in sites[key]], run))
    states: dict[str, LayerState] = {}
    for target, layer in places:
        own = sites[target.name]
        found = (next(factors) if target.name in real else _empty(site) for site in own)
        pairs = [_stacked(found, target.stack) for _ in target.slots]
        if not len(pairs[0][0]):
            continue
        tensors = _tensors(target, layer, pairs, twin=isinstance(name, str))
        if plan.config.lora_bias:
            tensors |= {
                f"{slot}.lora_B_bias": torch.zeros(shape[0], device=pairs[0][0].device)
                for slot, shape in zip(target.slots, target.shapes, strict=True)
            }
        groups = getattr(layer, "groups", 1)
        state = LayerState(target.kind, tensors, target.scale, target.enabled, groups)
        states[target.path] = _beside(states.get(target.path), state, target)
    _add_copies(states, plan, layers)
    return State(plan.config, states)


def _add_copies(states: dict[str, LayerState], plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Add the copies of what is trained in full, and the rows of single tokens, to the states."""
    for row in plan.trained:
        copies = {f"{name}.trained": stored(layers[row.path], name) for name in row.names}
        old = states.get(row.path, LayerState("module", {}))
        states[row.path] = replace(old, tensors={**old.tensors, **copies})
    for table in plan.tokens:
        ids = torch.tensor(table.ids, dtype=torch.int64)
        whole = stored(layers[table.path], WEIGHT)
        rows = {f"{WEIGHT}.{ROWS}": whole[ids.to(whole.device)], f"{WEIGHT}.{IDS}": ids}
        old = states.get(table.path, LayerState("module", {}))
        states[table.path] = replace(old, tensors={**old.tensors, **rows})


def as_started(plan: Plan, state: State) -> Plan:
    """Return the plan with the ranks that the start gave, without the layers it left out."""
    targets = []
    for target in plan.targets:
        tensors = state.layers[target.path].tensors if target.path in state.layers else {}
        ranks = [len(A) for name, A in tensors.items() if name.endswith(".lora_A")]
        if ranks and ranks[0] != target.r and target.kind != Experts.kind:
            count = target.parameters + (ranks[0] - target.r) * sum(map(sum, target.shapes))
            alpha = target.scale * (ranks[0] ** 0.5 if plan.config.use_rslora else ranks[0])
            target = replace(target, r=ranks[0], alpha=alpha, parameters=count)
        targets += [target] if ranks else []
    return replace(plan, targets=tuple(targets))


def look_at(module: nn.Module, kind: str = "") -> AdaptedLayer:
    """Return the module as the layer that it would be if it were adapted."""
    geometry = Experts if kind == Experts.kind else geometry_of(module)
    assert geometry is not None
    return look(module, geometry)


def _sites(
    target: Target,
    layer: AdaptedLayer,
    generator: torch.Generator | None,
    variant: str,
    absorption: Absorption | None,
) -> Iterator[Site]:
    for slot, shape in zip(target.slots, target.shapes, strict=True):
        where = target.path if slot == WEIGHT else f"{target.path} {slot}"
        whole = functools.partial(layer.matrix, slot)
        one = Site(
            where,
            target.path,
            shape,
            target.r,
            target.scale,
            layer.zero_factor,
            generator,
            whole,
            variant,
        )
        if absorption is not None:
            dtype = layer.frozen(layer.holder(slot)).dtype
            one = replace(one, packed=functools.partial(absorption.rounded, dtype))
        if not target.stack:
            yield one
        for index in range(target.stack):
            matrix = functools.partial(_one_of, whole, index)
            yield replace(one, name=f"{where}[{index}]", matrix=matrix)


def _one_of(whole: Callable[[], Tensor], index: int) -> Tensor:
    return whole()[index]


def _stacked(factors: Iterator[Factors], count: int) -> Factors:
    """Return the next pair of factors, or the next ones under a leading axis."""
    if not count:
        return next(factors)
    pairs = [next(factors) for _ in range(count)]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def _beside(old: LayerState | None, new: LayerState, target: Target) -> LayerState:
    """Return the new state with the parameters of the same module that are there already."""
    if old is None:
        return new
    scales = {slot.removesuffix(".lora_A"): 0.0 for slot in old.tensors if slot.endswith("lora_A")}
    scales = {slot: old.scale_of(slot) for slot in scales} | {target.slots[0]: new.scale}
    return with_scales(replace(new, tensors={**old.tensors, **new.tensors}), scales)


def _refuse(
    name: bool | str, places: Places, sites: Mapping[str, Sequence[Site]], *, absorbed: bool
) -> None:
    """Raise where a start cannot begin on some layers, listing them all."""
    kind = kind_of(name)
    problems = []
    ranks = False
    for target, layer in places:
        reason = _unreadable(target, layer, kind, absorbed)
        if reason:
            problems.append(f"{target.path}: {reason}")
            continue
        for site in sites[target.name]:
            reason = refusal(name, site)
            ranks = ranks or bool(reason)
            if not reason and kind in FROM_WEIGHTS and not is_finite(site.matrix()):
                reason = "its weight holds NaN or Inf"
            if reason:
                problems.append(f"{site.name}: {reason}")
    raise_all(
        ConfigError,
        f"These layers cannot start with init_lora_weights={name!r}:",
        problems,
        ("give them another rank by rank_pattern, " if ranks else "")
        + "take them out with exclude_modules, or use init_lora_weights=True.",
    )


def _unreadable(target: Target, layer: AdaptedLayer, kind: str, absorbed: bool) -> str:
    """Return why a start of that kind cannot see what it starts from."""
    if kind == "start":
        return ""
    if layer.kind == Experts.kind:
        return "parameters adapted on their own start from A alone, with B at zero"
    if device_of(layer).type == "meta":
        return "it is on the meta device and has no values; load the weights first"
    if layer.kind == "attention" and kind not in FROM_WEIGHTS:
        return "what the projections of an attention read is not seen from outside"
    if kind == "from_inputs":
        return ""
    if layer.storage is not None and not (absorbed and kind in FROM_WEIGHTS):
        return (
            f"its weight is packed, as {type(layer.storage).__name__}; pack the rest of W once "
            "the start is taken out of it, by "
            + ("absorb=True" if kind in FROM_WEIGHTS else "absorb on a model in full precision")
        )
    if any(layer.frozen(layer.holder(slot)).is_meta for slot in target.slots):
        return "its weight is offloaded; attach first and offload then"
    return ""


def _run(
    model: nn.Module,
    name: bool | str,
    places: Places,
    sites: Mapping[str, Sequence[Site]],
    modules: Mapping[str, nn.Module],
    calibration: Calibration | None,
) -> Run | None:
    """Return what runs the model for a start from data; None for the others."""
    if not from_data(name):
        if calibration is not None:
            raise ConfigError(
                f"init_lora_weights={name!r} starts from no data.\n"
                "Fix: leave data and loss out, or use eva or lora_ga."
            )
        return None
    if calibration is None:
        raise ConfigError(
            f"init_lora_weights={name!r} starts from data, and there are none.\n"
            "Fix: deltaw.attach(model, config, data=batches) with some batches of training data."
        )
    layers = {
        target.path: (
            modules[target.path],
            layer,
            dict(zip(target.slots, [site.name for site in sites[target.name]], strict=True)),
        )
        for target, layer in places
    }
    how = calibrating.inputs if kind_of(name) == "from_inputs" else calibrating.gradients
    return how(model, calibration, layers)


def _empty(site: Site) -> Factors:
    out, into = site.shape
    return (
        torch.empty(site.r, into, device="meta"),
        torch.empty(out, site.r, device="meta"),
    )


def _tensors(
    target: Target, layer: AdaptedLayer, pairs: Sequence[Factors], twin: bool
) -> dict[str, Tensor]:
    """Return the factors of all slots, and those of a start that is subtracted beside them."""
    tensors: dict[str, Tensor] = {}
    for slot, factors in zip(target.slots, pairs, strict=True):
        A, B = layer.pack(*factors)
        tensors |= {f"{slot}.lora_A": A, f"{slot}.lora_B": B}
        if twin and not A.is_meta and A.any() and B.any():
            if target.kind == Experts.kind:
                raise TargetError(
                    f"{target.name} cannot start where B A is not zero.\n"
                    "Fix: use init_lora_weights=True or another start whose B is zero."
                )
            tensors |= {f"{slot}.start_A": A.clone(), f"{slot}.start_B": B.clone()}
    return tensors
