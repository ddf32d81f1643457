"""TIES: trim each ΔW, elect a sign for every element, and average what agrees with it.

    τ̂ᵢ = the `density` largest elements of ΔWᵢ in magnitude, zeros elsewhere
    e  = sgn Σ wᵢ τ̂ᵢ                          (or, by frequency, sgn Σ sgn(wᵢ τ̂ᵢ))
    ΔW = mean of wᵢ τ̂ᵢ over the i with sgn(wᵢ τ̂ᵢ) = e, element by element

Source: arXiv 2306.01708, algorithm 1. Elements are trimmed within a layer, not across all, so that
one layer is in memory at a time; e is +1 where the sum is 0. The paper has one factor λ for all
instead of weights, and PEFT elects without them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.combine._checks import check_share
from deltaw.combine._elementwise import elementwise
from deltaw.combine._result import Reduced
from deltaw.errors import ConfigError
from deltaw.state import State

MAJORITIES = ("total", "frequency")


def ties(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    majority: str = "total",
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
) -> Reduced:
    """Return the TIES merge of adapters, cut by SVD.

    Args:
        states: the adapters.
        weights: any number for each; 1 where none are given.
        density: the share of elements that each ΔW keeps, in (0, 1].
        majority: whether signs are elected by `"total"` magnitude or by `"frequency"`.
        rank: the rank of every layer; by default the highest that it has in the adapters.
        energy: instead, the share of Σσ² that every layer keeps.
        exact: a full SVD also of large matrices instead of a random sketch.

    Raises:
        ConfigError: if a setting is out of range.
        MergeError: listing what does not go together.
    """
    check_share("density", density)
    check_majority(majority)

    def mix(deltas: list[Tensor]) -> Tensor:
        return elect([trim(delta, density) for delta in deltas], majority)

    return elementwise(states, weights, mix, rank, energy, exact)


def prune(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
) -> Reduced:
    """Return Σ wᵢ τ̂ᵢ, the sum of what trimming leaves, cut by SVD; arguments as in `ties`.

    Raises:
        ConfigError: if a setting is out of range.
        MergeError: listing what does not go together.
    """
    check_share("density", density)

    def mix(deltas: list[Tensor]) -> Tensor:
        return torch.stack([trim(delta, density) for delta in deltas]).sum(0)

    return elementwise(states, weights, mix, rank, energy, exact)


def check_majority(majority: str) -> None:
    """Raise a ConfigError for an unknown way of electing signs."""
    if majority not in MAJORITIES:
        raise ConfigError(f"majority must be one of {', '.join(MAJORITIES)}, not {majority!r}.")


def trim(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with its largest elements kept, `density` of all, and zeros elsewhere."""
    count = max(1, round(density * delta.numel()))
    kept = torch.zeros_like(delta).flatten()
    largest = delta.flatten().abs().topk(count).indices
    kept[largest] = delta.flatten()[largest]
    return kept.view_as(delta)


def elect(deltas: Sequence[Tensor], majority: str) -> Tensor:
    """Return the mean of the elements whose sign is the elected one, 0 where there are none."""
    stacked = torch.stack(list(deltas))
    votes = (stacked if majority == "total" else stacked.sign()).sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
