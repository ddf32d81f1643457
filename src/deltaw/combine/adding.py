"""Sums of adapters, exact in the sum of their ranks:

    Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁ s₁ B₁, w₂ s₂ B₂, ...] [A₁; A₂; ...]

Under DoRA (`bases`) the gains of the rows of W add up beside them.

Source: task arithmetic, arXiv 2212.04089, section 2: adding, subtracting and negating ΔW. Each ΔW
is one vector there, so no term mixes the B of one adapter with the A of another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.combine._checks import check, check_limit, sides
from deltaw.combine._copies import beside, mixed
from deltaw.combine._deltas import Key, Product, side_by_side
from deltaw.combine._joining import Joined, joined
from deltaw.combine._result import Kept, Reduced, cut
from deltaw.combine._settings import state_of
from deltaw.combine._spectrum import Limit, of_product
from deltaw.combine.bases import Base
from deltaw.errors import ConfigError
from deltaw.state import State


def concatenate(
    states: Sequence[State], weights: Sequence[float] | None = None, *, base: Base | None = None
) -> State:
    """Return Σ wᵢ ΔWᵢ with all factors side by side, at the sum of the ranks.

    A is that of the adapters row by row, B has weights and scales in it; every scale becomes 1,
    that is alpha = r. A bias on B is Σ wᵢ sᵢ bᵢ, a parameter trained in full Σ wᵢ Pᵢ.

    Args:
        states: the adapters, which need not share layers or ranks.
        weights: any number for each; 1 where none are given.
        base: the base's weights, which DoRA needs; the sum is a DoRA then.

    Raises:
        ConfigError: if there are no adapters or not as many weights.
        MergeError: listing what does not go together, or copies whose weights do not sum to 1.
    """
    weights = check(states, weights, base)
    full = mixed(states, weights)
    layers = {
        layer.path: layer.layer(_side_by_side(layer), _biases(layer))
        for layer in joined(states, weights, base)
    }
    return state_of(states, beside(layers, full))


def add(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Base | None = None,
) -> Reduced:
    """Return Σ wᵢ ΔWᵢ at the lowest rank that holds it, or cut to `rank` or to a share of Σσ².

    QR of the factors side by side, then the SVD of a core of their rank; in float64. Weights of 1
    and -1 are the sum and the difference of tasks.

    Args:
        states: the adapters.
        weights: any number for each; 1 where none are given.
        rank: the rank of every layer, or its own where that is lower.
        energy: the share of Σσ² that every layer keeps, in (0, 1].
        base: the base's weights, which DoRA needs; the gains of rows are kept, and what else is
            added is cut.

    Raises:
        ConfigError: if a setting is out of range, or `rank` above that of a matrix.
        MergeError: as `concatenate`.
    """
    weights = check(states, weights, base)
    check_limit(rank, energy, sides(states))
    full = mixed(states, weights)
    layers, kept = {}, list[Kept]()
    for layer in joined(states, weights, base):
        whole = _side_by_side(layer)
        spectra = {key: of_product(part) for key, part in whole.items() if len(part.R)}
        parts, report = cut(layer.path, spectra, Limit(rank, energy), together=layer.shares_rank)
        left = {key: part._replace(gain=whole[key].gain) for key, part in parts.items()}
        layers[layer.path] = layer.layer(whole | left, _biases(layer))
        kept += report
    return Reduced(state_of(states, beside(layers, full)), tuple(kept))


def resize(
    state: State,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Base | None = None,
) -> Reduced:
    """Return the adapter cut to `rank`, or to the rank that keeps `energy` of Σσ² in every layer.

    The result is the nearest of its rank to every ΔW in Frobenius norm. One below `rank` stays.
    Under DoRA, which needs the weights of `base`, that is so among those of the same gains.

    Raises:
        ConfigError: if neither or both are given, or out of range.
        MergeError: if the adapter is not one of factors alone, or holds NaN or Inf.
    """
    if rank is None and energy is None:
        raise ConfigError("Neither rank nor energy is given. Fix: give one of them.")
    return add([state], rank=rank, energy=energy, base=base)


def negate(state: State, *, base: Base | None = None) -> State:
    """Return the adapter of -ΔW, which takes a task away from a model; `base` as in `add`.

    Raises:
        MergeError: if it trained parameters in full, or cannot be combined.
    """
    return concatenate([state], [-1.0], base=base)


def _side_by_side(layer: Joined) -> dict[Key, Product]:
    return {key: side_by_side(layer.of(key)) for key in layer.keys}


def _biases(layer: Joined) -> dict[str, Tensor]:
    return {
        slot: torch.stack(own).sum(0)
        for slot in dict.fromkeys(slot for slot, _ in layer.keys)
        if (own := layer.shifts(slot))
    }
