"""Methods that look at each element of ΔW: one layer's matrices at a time, refactored by SVD."""

from collections.abc import Callable, Sequence

from torch import Tensor

from deltaw.combine._checks import check, check_limit, sides
from deltaw.combine._copies import beside, mixed
from deltaw.combine._joining import joined
from deltaw.combine._result import Kept, Reduced, cut
from deltaw.combine._settings import state_of
from deltaw.combine._spectrum import Limit, of_matrix
from deltaw.state import State

Mix = Callable[[list[Tensor]], Tensor]
"""From the weighted ΔW of all adapters that have a layer to one ΔW."""


def elementwise(
    states: Sequence[State],
    weights: Sequence[float] | None,
    mix: Mix,
    rank: int | None,
    energy: float | None,
    exact: bool,
) -> Reduced:
    """Return the adapter whose ΔW is nearest to `mix` of the weighted ΔW of every layer.

    Without `rank` and `energy` a layer gets the highest rank that it has in any of the adapters.
    """
    weights = check(states, weights)
    check_limit(rank, energy, sides(states))
    full = mixed(states, weights)
    layers, kept = {}, list[Kept]()
    for layer in joined(states, weights):
        own = layer.highest_rank()
        limit = Limit(rank or (own if energy is None else None), energy)
        spectra = {
            key: of_matrix(mix([part.dense(layer.dtype) for part in layer.of(key)]), limit, exact)
            for key in layer.keys
        }
        left, report = cut(layer.path, spectra, limit, together=layer.shares_rank)
        biases = {
            slot: mix(shifts)
            for slot in dict.fromkeys(slot for slot, _ in spectra)
            if (shifts := layer.shifts(slot))
        }
        layers[layer.path] = layer.layer(left, biases)
        kept += report
    return Reduced(state_of(states, beside(layers, full)), tuple(kept))
