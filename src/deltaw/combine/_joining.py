"""The layers of several adapters, side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.combine._deltas import (
    Key,
    Product,
    dtype_of,
    kernel,
    layer_of,
    products,
    shifts,
    slots,
    unfused,
)
from deltaw.state import LayerState, State


@dataclass(frozen=True)
class Joined:
    """One layer of several adapters: what each adds to W and to its bias, times its weight.

    `like` is the layer that a combination of them has.
    """

    path: str
    like: LayerState
    sizes: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[dict[Key, Product], ...]
    biases: tuple[dict[str, Tensor], ...]

    @property
    def keys(self) -> list[Key]:
        """Return slots and groups, slices in order."""
        found = {key for parts in self.parts for key in parts}
        return sorted(found, key=lambda key: (len(key[0]), key))

    def of(self, key: Key) -> list[Product]:
        """Return the products of a slot and group, of the adapters that have it."""
        return [parts[key] for parts in self.parts if key in parts]

    def shifts(self, slot: str) -> list[Tensor]:
        """Return what is added to the bias of a slot."""
        return [biases[slot] for biases in self.biases if slot in biases]

    def highest_rank(self) -> int:
        """Return the highest rank of a slot in any of the adapters, all its groups together."""
        groups = max(group for _, group in self.keys) + 1
        return groups * max(part.R.shape[0] for key in self.keys for part in self.of(key))

    def layer(self, parts: dict[Key, Product], biases: dict[str, Tensor]) -> LayerState:
        """Return the layer with these products."""
        return layer_of(self.like, self.sizes, parts, biases, self.dtype)


def joined(states: Sequence[State], weights: Sequence[float]) -> Iterator[Joined]:
    """Yield the layers with factors in any of the adapters, by path."""
    for path in sorted({path for state in states for path in state.layers}):
        held = [
            (state.layers[path], weight)
            for state, weight in zip(states, weights, strict=True)
            if path in state.layers and slots(state.layers[path])
        ]
        if not held:
            continue
        layers = [layer for layer, _ in held]
        if len({(layer.kind == "fused", len(layer.enabled)) for layer in layers}) > 1:
            layers = [unfused(layer) for layer in layers]
        like = next((layer for layer in layers if layer.kind == "conv1d"), layers[0])
        flags = zip(*(layer.enabled for layer in layers), strict=True)
        weighted = list(zip(layers, (weight for _, weight in held), strict=True))
        yield Joined(
            path,
            replace(like, enabled=tuple(any(own) for own in flags)),
            kernel(layers[0]),
            dtype_of(*layers),
            tuple(products(layer, weight) for layer, weight in weighted),
            tuple(shifts(layer, weight) for layer, weight in weighted),
        )
