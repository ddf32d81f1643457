"""PEFT's `add_weighted_adapter`, computed on ΔW.

PEFT is not followed where it is wrong, as its own reports say (huggingface/peft, #3004, #3449,
#3761 and #3769): `linear`, `ties` and `dare_*` there combine A with A and B with B, which adds the
products of one adapter's B with another's A; the `_svd` types multiply by the scale twice; rsLoRA
is off by √r, the bias on B is lost, and convolutions of one and three dimensions fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import deltaw
from deltaw import combine
from deltaw.combine import Reduced
from deltaw.errors import ConfigError
from deltaw.root import AdaptedModel, adapted_layers
from deltaw.state import LayerState, State

EXACT = ("linear", "cat")
OTHERS = ("svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


class CombiningModel(AdaptedModel):
    """Mixin of an adapted model that makes new adapters of those on it."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Put a new adapter on the model that combines others; it is frozen and not active.

        `cat` and `linear` are Σ wᵢ ΔWᵢ exactly, at the sum of the ranks or no higher than needed.
        The others have rank `svd_rank`, or the highest of the adapters': `svd` is the nearest to
        Σ wᵢ ΔWᵢ, and `ties`, `dare_linear`, `dare_ties` and `magnitude_prune`, which are the same
        with `_svd` after them, are the nearest to what the method makes of the elements of ΔW.

        `dare` draws from torch's global generator. `svd_full_matrices` and `svd_driver` change
        nothing, `svd_clamp` is not supported.

        Raises:
            ConfigError: if an option is out of range or not supported.
            StateError: if there is no such adapter, or the name is taken.
            MergeError: if the adapters do not go together, or trained parameters in full with
                weights that do not sum to 1.
        """
        if svd_clamp is not None:
            raise ConfigError("svd_clamp is not supported. Fix: leave it out.")
        captured = [deltaw.capture(self, name) for name in adapters]
        states = [_named(state, None) for state in captured]
        base = _LiveBase(self)
        if combination_type == "cat":
            made = combine.concatenate(states, weights, base=base)
        elif combination_type == "linear":
            made = combine.add(states, weights, base=base).state
        else:
            method = _method(combination_type, density, majority_sign_method, base)
            made = method(states, weights, svd_rank).state
        bases = (state.config.base_model_name_or_path for state in captured)
        made = _named(made, next((base for base in bases if base), None))
        deltaw.attach(self, made, adapter_name, trainable=False)


class _LiveBase:
    """The frozen weights of the adapters' own model."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model

    def lacking(self, state: State) -> list[str]:
        """Tell that the weights of all layers are there."""
        return []

    def is_other_than(self, state: State) -> bool:
        """Tell that the adapters are on this very base."""
        return False

    def matrix(self, path: str, layer: LayerState, slot: str) -> Tensor:
        """Return W of a slot (out, in)."""
        return adapted_layers(self._model)[path].matrix(slot)


def _named(state: State, base: str | None) -> State:
    """Return the adapter under another name of its base; all here are of the model at hand."""
    return replace(state, config=replace(state.config, base_model_name_or_path=base))


def _method(
    kind: str, density: float | None, majority: str, base: combine.Base
) -> Callable[[list[State], Sequence[float], int | None], Reduced]:
    name = kind.removesuffix("_svd")
    if name not in OTHERS:
        known = ", ".join((*EXACT, *OTHERS, *(f"{other}_svd" for other in OTHERS[1:])))
        raise ConfigError(f"combination_type must be one of {known}, not {kind!r}.")
    if name == "svd":
        return lambda states, weights, r: combine.add(
            states, weights, rank=r or max(map(combine.highest_rank, states), default=1), base=base
        )
    if density is None:
        raise ConfigError(f"{kind} needs a density. Fix: pass one in (0, 1].")
    if name == "ties":
        return lambda states, weights, r: combine.ties(
            states, weights, density=density, majority=majority, rank=r
        )
    if name == "magnitude_prune":
        return lambda states, weights, r: combine.prune(states, weights, density=density, rank=r)
    seed = int(torch.randint(2**31, ()))
    return lambda states, weights, r: combine.dare(
        states,
        weights,
        density=density,
        ties=name == "dare_ties",
        majority=majority,
        seed=seed,
        rank=r,
    )
