"""The layers of several adapters, side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deltaw.combine._deltas import (
    EXPERTS,
    Key,
    Matrix,
    Product,
    bias_in_one,
    dtype_of,
    in_one,
    kernel,
    products,
    shifts,
    slots,
)
from deltaw.combine._layers import layer_of
from deltaw.combine.bases import Base, is_dora
from deltaw.state import LayerState, State


@dataclass(frozen=True)
class Joined:
    """One layer of several adapters: what each adds to W and to its bias, times its weight.

    `like` is the layer that a combination of them has, and `matrix` gives its W under DoRA.
    """

    path: str
    like: LayerState
    sizes: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[dict[Key, Product], ...]
    biases: tuple[dict[str, Tensor], ...]
    matrix: Matrix | None

    @property
    def keys(self) -> list[Key]:
        """Return slots and groups, slices in order, and parameters in that of their module."""
        found = {key for parts in self.parts for key in parts}
        if self.like.kind == EXPERTS:
            order = slots(self.like)
            return sorted(found, key=lambda key: (order.index(key[0]), key[1]))
        return sorted(found, key=lambda key: (len(key[0]), key))

    def of(self, key: Key) -> list[Product]:
        """Return the products of a slot and group, of the adapters that have it."""
        return [parts[key] for parts in self.parts if key in parts]

    def shifts(self, slot: str) -> list[Tensor]:
        """Return what is added to the bias of a slot."""
        return [biases[slot] for biases in self.biases if slot in biases]

    @property
    def shares_rank(self) -> bool:
        """Whether the products of a slot share its rank, as groups do and experts do not."""
        return self.like.kind != EXPERTS

    def highest_rank(self) -> int:
        """Return the highest rank of a slot in any of the adapters, all its groups together."""
        groups = max(group for _, group in self.keys) + 1 if self.shares_rank else 1
        return groups * max(part.R.shape[0] for key in self.keys for part in self.of(key))

    def layer(self, parts: dict[Key, Product], biases: dict[str, Tensor]) -> LayerState:
        """Return the layer with these products."""
        return layer_of(self.like, self.sizes, parts, biases, self.dtype, self.matrix)


def joined(
    states: Sequence[State], weights: Sequence[float], base: Base | None = None
) -> Iterator[Joined]:
    """Yield the layers with factors in any of the adapters, by path."""
    asked = base if any(map(is_dora, states)) else None
    for path in sorted({path for state in states for path in state.layers}):
        held = [
            (state.layers[path], weight)
            for state, weight in zip(states, weights, strict=True)
            if path in state.layers and slots(state.layers[path])
        ]
        if held:
            yield _joined(path, [layer for layer, _ in held], [weight for _, weight in held], asked)


def _joined(
    path: str, layers: Sequence[LayerState], weights: Sequence[float], base: Base | None
) -> Joined:
    matrices = [None if base is None else partial(base.matrix, path, layer) for layer in layers]
    held = list(zip(layers, weights, matrices, strict=True))
    parts = [products(*each) for each in held]
    biases = [shifts(layer, weight) for layer, weight, _ in held]
    counts = [len(layer.enabled) for layer in layers]
    if len(set(counts)) > 1:
        parts = [in_one(p, n) if n else p for p, n in zip(parts, counts, strict=True)]
        biases = [bias_in_one(b, n) if n else b for b, n in zip(biases, counts, strict=True)]
        layers = [replace(own, kind="linear", enabled=()) if own.enabled else own for own in layers]
    like = next((layer for layer in layers if layer.kind == "conv1d"), layers[0])
    fullest = sorted(layers, key=lambda layer: -len(slots(layer)))
    like = replace(
        like,
        tensors={name: t for layer in fullest for name, t in layer.tensors.items()},
        enabled=tuple(map(any, zip(*(layer.enabled for layer in layers), strict=True))),
    )
    matrix: Matrix | None = None if base is None else partial(base.matrix, path, like)
    of_slice, slices = next((p for p in zip(matrices, counts, strict=True) if p[1]), (None, 0))
    if len(set(counts)) > 1 and of_slice is not None:
        matrix = partial(_whole, of_slice, slices)
    return Joined(
        path,
        like,
        kernel(held[0][0]),
        dtype_of(*(layer for layer, *_ in held)),
        tuple(parts),
        tuple(biases),
        matrix,
    )


def _whole(of_slice: Matrix, slices: int, slot: str) -> Tensor:
    """Return W of a fused layer, of which `slot` is all."""
    return torch.cat([of_slice(f"slice_{number}") for number in range(slices)])
