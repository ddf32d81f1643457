"""What adapters must have in common, and what settings may be, before anything is computed."""

import math
from collections.abc import Mapping, Sequence

import torch

from deltaw.combine._deltas import copies, groups_in, pair, slots
from deltaw.errors import ConfigError, MergeError, printable, raise_all
from deltaw.kernels.merge import is_finite
from deltaw.state import LayerState, State

FACTORS = (".lora_A", ".lora_B", ".lora_B_bias", ".start_A", ".start_B", ".trained")


def check(states: Sequence[State], weights: Sequence[float] | None) -> list[float]:
    """Return one weight per adapter, 1 where none are given.

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
        [problem for n, state in enumerate(states, 1) for problem in _unusable(n, state)],
        "combine adapters whose ΔW is linear in B A, with finite numbers in them.",
    )
    raise_all(
        MergeError,
        "These adapters do not go together:",
        [*_other_bases(states), *_misfits(states)],
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
                A, B = pair(layer, slot)
                groups = groups_in(layer, slot)
                side = min(A[0].numel(), len(B) // groups) * groups
                found[path] = max(side, len(A), found.get(path, 0))
    return dict(sorted(found.items()))


def low_rank_paths(state: State) -> list[str]:
    """Return the paths of the layers with factors."""
    return sorted(path for path, layer in state.layers.items() if slots(layer))


def _unusable(number: int, state: State) -> list[str]:
    """List what keeps one adapter from being combined with any other."""
    who = f"adapter {number}"
    if state.config.method != "lora":
        return [f"{who}: its method is {state.config.method!r}, not linear in its factors"]
    problems = [] if state.layers else [f"{who}: it is empty"]
    for path, layer in state.layers.items():
        where = f"{who}, {printable(path, 300)!r}"
        problems += [
            f"{where}: {name} is not linear in its factors"
            for name in layer.tensors
            if not name.endswith(FACTORS)
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


def _other_bases(states: Sequence[State]) -> list[str]:
    """List the adapters whose base has other bits than that of an earlier one.

    A fingerprint is that of the adapted layers, so only those of the same layers are compared.
    """
    seen: dict[tuple[object, ...], tuple[int, str]] = {}
    problems = []
    for number, state in enumerate(states, 1):
        if state.base is None:
            continue
        kind = (state.base.split(":")[0], *low_rank_paths(state))
        first, base = seen.setdefault(kind, (number, state.base))
        if base != state.base:
            problems.append(f"adapter {number} was trained on another base than adapter {first}")
    return problems


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
    return problems


def _forms(layer: LayerState) -> dict[str, str]:
    """Return the form of a layer's ΔW and of each full copy, which all adapters must share."""
    forms = {
        name.removesuffix(".trained"): f"trained in full as {tuple(tensor.shape)}"
        for name, tensor in copies(layer).items()
    }
    for slot in slots(layer):
        A, B = pair(layer, slot)
        rows = len(B) * max(len(layer.enabled), 1)
        kind = "linear" if layer.kind in ("conv1d", "fused") else layer.kind
        shape = " x ".join(map(str, (rows, *A.shape[1:])))
        within = f" in {layer.groups} groups" if layer.kind == "conv" and layer.groups > 1 else ""
        what = slot if layer.kind == "attention" else "weight"
        forms[what] = f"{'factored ' * layer.factored}{kind} {shape}{within}"
    return forms
