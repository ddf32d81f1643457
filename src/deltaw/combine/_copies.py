"""Parameters trained in full, whose originals a state does not hold.

P' = P + Σ wᵢ (Pᵢ - P) = Σ wᵢ Pᵢ  only where  Σ wᵢ = 1 over the adapters that hold a copy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltaw.combine._deltas import copies, wide
from deltaw.errors import MergeError, raise_all
from deltaw.state import IDS, LayerState, State


def without_copies(state: State) -> State:
    """Return the low-rank part of an adapter alone, without what it trained in full."""
    layers = {}
    for path, layer in state.layers.items():
        own = {name: t for name, t in layer.tensors.items() if name not in copies(layer)}
        if own:
            layers[path] = replace(layer, tensors=own)
    config = replace(state.config, bias="none", modules_to_save=[], trainable_token_indices=None)
    return replace(state, config=config, layers=layers)


def mixed(states: Sequence[State], weights: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """Return the weighted sums of full copies by layer.

    Raises:
        MergeError: listing those whose weights do not sum to 1.
    """
    held: dict[str, dict[str, list[tuple[float, Tensor]]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for path, layer in state.layers.items():
            for name, tensor in copies(layer).items():
                held.setdefault(path, {}).setdefault(name, []).append((weight, tensor))
    raise_all(
        MergeError,
        "Parameters trained in full can be mixed only with weights that sum to 1, since an adapter "
        "does not hold their originals:",
        [
            f"{path}.{name.removesuffix('.trained')}: {sum(w for w, _ in own):g}"
            for path, names in held.items()
            for name, own in names.items()
            if not name.endswith(IDS) and not math.isclose(sum(w for w, _ in own), 1, abs_tol=1e-9)
        ],
        "give weights that sum to 1, or leave them out: deltaw.combine.without_copies(state), or "
        "--drop-copies.",
    )
    return {
        path: {name: own[0][1] if name.endswith(IDS) else _sum(own) for name, own in names.items()}
        for path, names in held.items()
    }


def beside(
    layers: Mapping[str, LayerState], full: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, LayerState]:
    """Return the layers with these full copies added."""
    both = dict(layers)
    for path, tensors in full.items():
        layer = both.get(path, LayerState("module", {}))
        both[path] = replace(layer, tensors={**layer.tensors, **tensors})
    return both


def _sum(own: Sequence[tuple[float, Tensor]]) -> Tensor:
    dtype = own[0][1].dtype
    total = torch.stack([wide(tensor) * weight for weight, tensor in own]).sum(0)
    return (total if dtype.is_floating_point else total.round()).to(dtype)
