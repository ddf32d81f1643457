"""What adapters must have in common, and what settings may be, before anything is computed."""

import math
from collections.abc import Mapping, Sequence

import torch

from deltaw.combine._deltas import (
    ALONGSIDE,
    EXPERTS,
    MAGNITUDE,
    count_in,
    matrix_shape,
    pair,
    rank_of,
    slots,
)
from deltaw.combine.bases import Base, is_dora
from deltaw.errors import ConfigError, MergeError, printable, raise_all
from deltaw.kernels.merge import is_finite
from deltaw.patterns import ends_with
from deltaw.state import IDS, LayerState, State

FACTORS = (".lora_A", ".lora_B", ".lora_B_bias", ".start_A", ".start_B", *ALONGSIDE)


def check(
    states: Sequence[State], weights: Sequence[float] | None, base: Base | None = None
) -> list[float]:
    """Return one weight per adapter, 1 where none are given.

    `base` gives the weights that DoRA needs; without it DoRA is refused.

    Raises:
        ConfigError: if there are no adapters, or the weights are not one number for each.
        MergeError: listing every adapter that is not low-rank factors alone or holds NaN or Inf,
            and every layer in which they do not go together.
    """
    if not states:
        raise ConfigError("There is nothing to combine. Fix: give one adapter at least.")
    weights = [1.0] * len(states) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(states):
        raise ConfigError(
            f"{len(states)} adapters need as many weights, not {len(weights)}.\n"
            "Fix: give one weight per adapter."
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"The weights must be finite, not {weights}.")
    raise_all(
        MergeError,
        "These adapters cannot be combined:",
        [
            *(
                problem
                for n, state in enumerate(states, 1)
                for problem in _unusable(n, state, base)
            ),
            *_stacks_under_dora(states),
        ],
        "combine adapters whose ΔW is linear in B A, with finite numbers in them.",
    )
    under_dora = base if any(map(is_dora, states)) else None
    raise_all(
        MergeError,
        "The base given lacks these weights, on which the ΔW of DoRA depends:",
        [] if under_dora is None else _lacking(under_dora, states),
        "give the adapters' own base; layers without a weight of their own cannot be combined "
        "under DoRA (merge them and use deltaw extract).",
    )
    raise_all(
        MergeError,
        "These adapters do not go together:",
        [*_other_bases(states), *_other_than(base, states), *_misfits(states)],
        "combine adapters of one base model, or take out the layers above.",
    )
    return weights


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError unless the value lies in (0, 1]."""
    if isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigError(f"{name} must lie in (0, 1], not {value!r}.")


def check_limit(rank: int | None, energy: float | None, sides: Mapping[str, int]) -> None:
    """Raise a ConfigError for a rank or energy out of range.

    `sides` holds the highest rank of each layer. A rank above that of a small layer means all of
    it, one above that of every layer is an error.
    """
    if rank is not None and energy is not None:
        raise ConfigError("Both rank and energy are given. Fix: give one of them.")
    if energy is not None:
        check_share("energy", energy)
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be a whole number above 0, not {rank!r}.")
    most = max(sides.values(), default=rank)
    if rank > most:
        path = next(path for path, side in sides.items() if side == most)
        raise ConfigError(
            f"rank {rank} is above that of every matrix; the largest, {printable(path, 300)!r}, "
            f"has {most}.\nFix: give a rank up to {most}, or an energy."
        )


def sides(states: Sequence[State]) -> dict[str, int]:
    """Return the highest rank of every layer: its matrix's smaller side, or what it has already."""
    found: dict[str, int] = {}
    for state in states:
        for path, layer in state.layers.items():
            for slot in slots(layer):
                out, width = matrix_shape(layer, slot)
                groups = 1 if layer.kind == EXPERTS else count_in(layer, slot)
                side = min(width, out // groups) * groups
                found[path] = max(side, rank_of(layer, slot), found.get(path, 0))
    return dict(sorted(found.items()))


def adapted_weights(state: State) -> list[str]:
    """Return the weights with factors: the paths of layers, and those of single parameters."""
    found = []
    for path, layer in state.layers.items():
        if layer.kind == EXPERTS:
            found += [f"{path}.{slot}" for slot in slots(layer)]
        elif slots(layer):
            found.append(path)
    return sorted(found)


def _unusable(number: int, state: State, base: Base | None) -> list[str]:
    """List what keeps one adapter from being combined with any other."""
    who = f"adapter {number}"
    if is_dora(state) and base is None:
        return [
            f"{who}: the ΔW of DoRA depends on the base's weights; sums take them by "
            "base=deltaw.combine.StoredBase(folder), or --base"
        ]
    if state.config.method not in ("lora", "dora"):
        return [f"{who}: its method is {state.config.method!r}, not linear in its factors"]
    problems = [] if state.layers else [f"{who}: it is empty"]
    factors = (*FACTORS, f".{MAGNITUDE}") if is_dora(state) else FACTORS
    if packed := _packed_stacks(state):
        problems.append(
            f"{who}: {', '.join(packed)} hold stacked experts as PEFT packs them, and no "
            "deltaw.json tells them apart; load it onto its base, and combine what "
            "deltaw.capture returns or deltaw.save writes"
        )
    for path, layer in state.layers.items():
        where = f"{who}, {printable(path, 300)!r}"
        problems += [
            f"{where}: {name} is not linear in its factors"
            for name in layer.tensors
            if not name.endswith(factors)
        ]
        problems += [
            f"{where}: {slot}.lora_B is missing"
            for slot in slots(layer)
            if f"{slot}.lora_B" not in layer.tensors
        ]
        problems += [
            f"{where}: {name} has {int((~torch.isfinite(tensor)).sum())} NaN or Inf of "
            f"{tensor.numel()}"
            for name, tensor in layer.tensors.items()
            if not tensor.is_meta and not is_finite(tensor)
        ]
        problems += [
            f"{where}: {n} is on the meta device" for n, t in layer.tensors.items() if t.is_meta
        ]
    return problems


def _packed_stacks(state: State) -> list[str]:
    """Return the layers of a file whose parameters the base alone tells apart."""
    wanted = {name.rpartition(".")[0] for name in state.config.target_parameters or ()}
    return [
        printable(path, 300)
        for path, layer in state.layers.items()
        if (layer.kind == EXPERTS and any(slot.isdigit() for slot in slots(layer)))
        or (layer.kind == "linear" and any(module and ends_with(path, module) for module in wanted))
    ]


def _lacking(base: Base, states: Sequence[State]) -> list[str]:
    """List the weights that the base has not."""
    return [printable(name, 300) for name in sorted({n for s in states for n in base.lacking(s)})]


def _other_than(base: Base | None, states: Sequence[State]) -> list[str]:
    """List the adapters that the given base is not the base of."""
    return [
        f"adapter {number} was trained on another base than the one given"
        for number, state in enumerate(states, 1)
        if base is not None and is_dora(state) and base.is_other_than(state)
    ]


def _other_bases(states: Sequence[State]) -> list[str]:
    """List the adapters whose base has other bits than that of an earlier one, or another name.

    A fingerprint is that of the adapted layers, so only those of the same layers are compared; of
    adapters without one to compare with, the last parts of the names are.
    """
    seen: dict[tuple[object, ...], tuple[int, str]] = {}
    named: tuple[int, str] | None = None
    problems = []
    for number, state in enumerate(states, 1):
        name = state.config.base_model_name_or_path
        kind = (str(state.base).split(":")[0], *adapted_weights(state))
        if state.base is not None and kind in seen:
            first, base = seen[kind]
            if base != state.base:
                problems.append(
                    f"adapter {number} was trained on another base than adapter {first}"
                )
            continue
        if state.base is not None:
            seen[kind] = number, state.base
        if name and named and _last(name) != _last(named[1]):
            problems.append(
                f"adapter {number} is for {printable(name, 300)}, adapter {named[0]} for "
                f"{printable(named[1], 300)}; if these are the same weights, use one "
                "base_model_name_or_path in both, or --any-base"
            )
        named = named or ((number, name) if name else None)
    return problems


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _misfits(states: Sequence[State]) -> list[str]:
    """List the layers and the full copies whose shapes differ between adapters."""
    problems = []
    layers: dict[str, dict[str, int]] = {}
    for number, state in enumerate(states, 1):
        for path, layer in state.layers.items():
            for what, form in _forms(layer).items():
                layers.setdefault(f"{path}: {what}", {}).setdefault(form, number)
    for name, forms in layers.items():
        if len(forms) > 1:
            told = ", ".join(f"{form} in adapter {number}" for form, number in forms.items())
            problems.append(f"{printable(name, 300)} is {told}")
    return [*problems, *_unordered(states)]


def _stacks_under_dora(states: Sequence[State]) -> list[str]:
    """List the stacked experts beside DoRA, which are adapted by plain LoRA alone."""
    return [
        f"{printable(path, 300)} in adapter {number} holds stacked experts, which have no DoRA"
        for number, state in enumerate(states, 1)
        for path, layer in state.layers.items()
        if layer.kind == EXPERTS and any(map(is_dora, states))
    ]


def _unordered(states: Sequence[State]) -> list[str]:
    """List the modules of which no adapter has all parameters, so that none says their order."""
    held: dict[str, list[set[str]]] = {}
    for state in states:
        for path, layer in state.layers.items():
            if layer.kind == EXPERTS:
                held.setdefault(path, []).append(set(slots(layer)))
    return [
        f"{printable(path, 300)}: no adapter has all of {', '.join(sorted(set.union(*own)))}"
        for path, own in held.items()
        if set.union(*own) not in own
    ]


def _forms(layer: LayerState) -> dict[str, str]:
    """Return the form of a layer's ΔW and of each full copy, which all adapters must share."""
    forms = {
        name.removesuffix(".trained"): f"trained in full as {tuple(tensor.shape)}"
        for name, tensor in layer.tensors.items()
        if name.endswith(".trained")
    }
    for name, ids in layer.tensors.items():
        if name.endswith(f".{IDS}"):
            forms[name.removesuffix(f".{IDS}")] = f"trained for the tokens {ids.tolist()}"
    for slot in slots(layer):
        A, B = pair(layer, slot)
        rows = len(B) * max(len(layer.enabled), 1)
        if layer.kind == EXPERTS:
            forms[slot] = f"experts {' x '.join(map(str, (*B.shape[:-1], A.shape[-1])))}"
            continue
        kind = "linear" if layer.kind in ("conv1d", "fused") else layer.kind
        shape = " x ".join(map(str, (rows, *A.shape[1:])))
        within = f" in {layer.groups} groups" if layer.kind == "conv" and layer.groups > 1 else ""
        what = slot if layer.kind == "attention" else "weight"
        forms[what] = f"{'factored ' * layer.factored}{kind} {shape}{within}"
    return forms
