"""The names of the tensors in a LayerState, and which are which."""

import re

from torch import Tensor

from deltaw.state import IDS, ROWS, LayerState

A, B, B_BIAS, TRAINED = "weight.lora_A", "weight.lora_B", "weight.lora_B_bias", ".trained"
TOKENS, TOKEN_IDS = f"weight.{ROWS}", f"weight.{IDS}"
MAGNITUDE = "weight.lora_magnitude_vector"


def rows(layer: LayerState) -> dict[str, Tensor]:
    """Return the rows of a table that are trained and their tokens, where there are some."""
    return {name: t for name, t in layer.tensors.items() if name in (TOKENS, TOKEN_IDS)}


def copies(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors trained as full copies, by parameter name."""
    return {
        name.removesuffix(TRAINED): tensor
        for name, tensor in layer.tensors.items()
        if name.endswith(TRAINED)
    }


def factors(layer: LayerState) -> dict[str, Tensor]:
    """Return the tensors of the low-rank ΔW."""
    others = rows(layer)
    return {
        name: t
        for name, t in layer.tensors.items()
        if not name.endswith(TRAINED) and name not in others
    }


def slices(layer: LayerState) -> list[str]:
    """Return the slots of the adapted slices of a fused layer."""
    return [f"slice_{index}" for index, flag in enumerate(layer.enabled) if flag]


def pinned(path: str) -> str:
    """Return the pattern that matches this path alone."""
    return "^" + re.escape(path)
