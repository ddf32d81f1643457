"""How an adapter is kept that is only read."""

from dataclasses import dataclass

import torch

from deltaw.config import LoraConfig
from deltaw.errors import StateError, raise_all
from deltaw.fitting import Fits
from deltaw.layers.conv_spanning import SpanningConv
from deltaw.layers.experts import Experts


@dataclass(frozen=True)
class Serving:
    """The dtype of A and B, and the highest rank that may take its place; None for the usual."""

    dtype: torch.dtype | None = None
    reserve: int | None = None

    def require_possible(self, config: LoraConfig, fits: Fits, trainable: bool) -> None:
        """Raise a StateError listing why this adapter cannot be kept so."""
        problems = []
        if trainable and self.dtype is not None:
            problems.append(f"dtype={self.dtype}: it would be trained, which float32 is kept for")
        if self.dtype is not None and not self.dtype.is_floating_point:
            problems.append(f"dtype={self.dtype}: factors are floating-point numbers")
        if self.reserve is not None:
            problems += self._reserve_problems(self.reserve, config, fits, trainable)
        fix = "leave the option out, or load a frozen LoRA adapter of a rank up to the reserve."
        raise_all(StateError, "The adapter cannot be kept as asked for:", problems, fix)

    def _reserve_problems(
        self, reserve: int, config: LoraConfig, fits: Fits, trainable: bool
    ) -> list[str]:
        problems = []
        if trainable:
            problems.append(f"reserve={reserve}: it would be trained, zeros of the reserve too")
        if config.method != "lora":
            problems.append(f"reserve={reserve}: its method is {config.method}, not lora")
        for path, (geometry, slots) in fits.items():
            ranks = [fit.A.shape[-2] for fit in slots if fit.A is not None]
            if ranks and issubclass(geometry, SpanningConv):
                problems.append(f"{path}: factors that span groups come in blocks of one rank")
            if ranks and issubclass(geometry, Experts):
                problems.append(f"{path}: factors of parameters have no reserve")
            if ranks and max(ranks) > reserve:
                problems.append(f"{path}: rank {max(ranks)} is above reserve={reserve}")
        return problems


USUAL = Serving()
"""As an adapter is kept that is trained."""
