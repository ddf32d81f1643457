"""Activations that the backward pass computes again, by whatever name transformers has for it."""

from typing import Any

NAMES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Of newer releases and of older ones."""


def recompute(model: Any) -> None:
    """Have a model of transformers keep the inputs of its blocks alone, without reentrance."""
    enable = next(name for name in NAMES if name in dir(type(model)))
    getattr(model, enable)({"use_reentrant": False})
