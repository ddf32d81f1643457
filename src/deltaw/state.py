"""An adapter as pure data: tensors and settings, no modules and no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltaw.config import LoraConfig

ROWS, IDS = "trainable_tokens_delta", "token_indices"
"""The names of the rows of a table that are trained, and of the tokens they are for."""


@dataclass(frozen=True)
class LayerState:
    """What one module of the base model learned.

    `tensors` is keyed `<slot>.lora_A`, `<slot>.lora_B`, `<slot>.lora_B_bias` for a low-rank ΔW of a
    slot, `<name>.trained` for a parameter or buffer trained as a full copy, and
    `<name>.trainable_tokens_delta` (n, width) with `<name>.token_indices` (n,) for rows of one.
    Every factor is in the orientation of the layer's (out, in) matrix:

    | kind | A | B |
    |---|---|---|
    | linear, conv1d (GPT-2) | (r, in) | (out, r) |
    | embedding | (r, vocabulary) | (width, r) |
    | conv, conv_transpose | (r, in / groups, *kernel) | (out, r) |
    | conv, spanning all groups | (R, in, *kernel) | (out, R / groups) |
    | conv, factored (loralib) | (R, in k^ceil(d/2)) | (out / groups k^floor(d/2), R) |
    | fused, per slice | (r, in) | (out / slices, r) |
    | experts, per parameter | (E, r, in) | (E, out, r) |
    | attention, per slot q, k, v, out | (r, in of the slot) | (width, r) |
    | module | - | - |

    A start that is subtracted again is kept as `<slot>.start_A` and `<slot>.start_B`.

    `scale` multiplies B A, or what `scales` says for a slot; `enabled` marks the adapted slices of
    a fused layer, `groups` is that of a convolution.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    enabled: tuple[bool, ...] = ()
    groups: int = 1
    factored: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)

    def scale_of(self, slot: str) -> float:
        """Return what multiplies B A of a slot."""
        return self.scales.get(slot, self.scale)


@dataclass(frozen=True)
class State:
    """One adapter: its settings and what each module, keyed by its path in the base, learned.

    `base` is the fingerprint of the base weights it was trained on, where known.
    """

    config: LoraConfig
    layers: Mapping[str, LayerState]
    base: str | None = None


def without_twin(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of twice the rank with B A - B0 A0: [A; A - A0] and [B - B0, B0]."""
    return torch.cat((A, A - A0)), torch.cat((B - B0, B0), 1)


def plain(layer: LayerState) -> LayerState:
    """Return the layer with a start that is subtracted as part of A and B, of twice the rank."""
    tensors = {name: t for name, t in layer.tensors.items() if ".start_" not in name}
    for name, A0 in layer.tensors.items():
        if name.endswith(".start_A"):
            slot = name.removesuffix(".start_A")
            a, b, B0 = f"{slot}.lora_A", f"{slot}.lora_B", layer.tensors[f"{slot}.start_B"]
            tensors[a], tensors[b] = without_twin(tensors[a], tensors[b], A0, B0)
    return replace(layer, tensors=tensors)


def with_scales(layer: LayerState, scales: Mapping[str, float]) -> LayerState:
    """Return the layer with a scale for each of its slots."""
    scale = next(iter(scales.values()))
    others = {slot: other for slot, other in scales.items() if other != scale}
    return replace(layer, scale=scale, scales=others)
