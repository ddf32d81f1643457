"""DARE: drop elements of each ΔW at random and scale up the rest, so that its expectation stays.

    ΔW̃ᵢ = Mᵢ ∘ ΔWᵢ / density  with  Mᵢ ~ Bernoulli(density),  then  Σ wᵢ ΔW̃ᵢ  or TIES

Source: arXiv 2311.03099 (drop and rescale), with p = 1 - density. The masks are over the elements
of ΔW; PEFT drops those of A and of B, which leaves density² of the terms and mixes adapters. A mask
is nearly of full rank, so look at what a cut to a low rank keeps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.combine._checks import check_share
from deltaw.combine._elementwise import elementwise
from deltaw.combine._result import Reduced
from deltaw.combine.electing import check_majority, elect
from deltaw.state import State


def dare(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.5,
    ties: bool = False,
    majority: str = "total",
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
) -> Reduced:
    """Return the DARE merge of adapters, cut by SVD.

    Args:
        states: the adapters.
        weights: any number for each; 1 where none are given.
        density: the probability of keeping an element, in (0, 1].
        ties: elect signs and average what agrees instead of adding; nothing is trimmed.
        majority: whether signs are elected by `"total"` magnitude or by `"frequency"`.
        seed: of the masks; the same seed gives the same adapter.
        rank: the rank of every layer; by default the highest that it has in the adapters.
        energy: instead, the share of Σσ² that every layer keeps.
        exact: a full SVD also of large matrices instead of a random sketch.

    Raises:
        ConfigError: if a setting is out of range.
        MergeError: listing what does not go together.
    """
    check_share("density", density)
    check_majority(majority)
    generator = torch.Generator().manual_seed(seed)

    def mix(deltas: list[Tensor]) -> Tensor:
        thinned = [drop(delta, density, generator) for delta in deltas]
        return elect(thinned, majority) if ties else torch.stack(thinned).sum(0)

    return elementwise(states, weights, mix, rank, energy, exact)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return `delta` with elements dropped at random and the rest divided by `density`."""
    shape, dtype = delta.shape, torch.float64
    drawn = torch.rand(shape, generator=generator, dtype=dtype, device="cpu")
    return torch.where(drawn < density, delta / density, 0)
