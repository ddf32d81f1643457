"""LoRA with ranks in reserve, so that one can take another's place in a compiled model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import LowRank
from deltaw.adapters import Parts
from deltaw.adapters.lora import LoraAdapter
from deltaw.errors import StateError


class ReservedLora(LoraAdapter):
    """Hold A (R, in) and B (out, R) for the reserve R; only the first `rank` are not zero.

    A compiled graph reads all of them and the scale from a tensor, so that `put` changes rank and
    scale without another compilation; elsewhere the zeros are left out.
    """

    def __init__(self, parts: Parts, reserve: int) -> None:
        A = parts.A.new_zeros(reserve, parts.A.shape[1])
        B = parts.B.new_zeros(parts.B.shape[0], reserve)
        bias = None if parts.bias is None else parts.bias.clone()
        super().__init__(A, B, parts.scale, parts.dropout, bias)
        self.gain = torch.zeros((), dtype=torch.float64, device="cpu")
        self.put(parts.A, parts.B, parts.scale, parts.bias)

    @property
    def rank(self) -> int:
        """Return the rank of the adapter that is in."""
        return self._rank

    @property
    def reserve(self) -> int:
        """Return the highest rank."""
        return self.lora_A.shape[0]

    @torch.no_grad()
    def put(self, A: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> None:
        """Put another adapter in, of a rank up to the reserve."""
        self._rank = A.shape[0]
        self.lora_A[: self._rank].copy_(A)
        self.lora_A[self._rank :].zero_()
        self.lora_B[:, : self._rank].copy_(B)
        self.lora_B[:, self._rank :].zero_()
        if bias is not None and self.lora_B_bias is not None:
            self.lora_B_bias.copy_(bias)
        self.scale = scale
        self.gain.fill_(scale)

    @torch.no_grad()
    def clear(self) -> None:
        """Put nothing in."""
        self.put(self.lora_A[:0], self.lora_B[:, :0], self.scale, None)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()

    def forward(self, matrix: Callable[[], Tensor]) -> LowRank:
        """Return the factors: without the padding, or with them in a compiled graph."""
        if not torch.compiler.is_compiling():
            rank = max(self.rank, 1)  # A convolution takes no zero kernels.
            A, B = self.lora_A[:rank], self.lora_B[:, :rank]
            return LowRank(A, B, self.scale, self.bias_delta())
        shift = None if self.lora_B_bias is None else self.lora_B_bias * self.gain
        return LowRank(self.lora_A, self.lora_B, self.gain, shift)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *of: Any) -> None:
        if any(prefix + name in state_dict for name in self.state_dict()):
            raise StateError(
                "A checkpoint does not say which rank and scale a reserved adapter had.\n"
                "Fix: save it by deltaw.save, and load it by deltaw.load(..., swap=True)."
            )

    def extra_repr(self) -> str:
        """Show rank, reserve and scale where the model is printed."""
        return f"r={self.rank} of {self.reserve}, scale={self.scale:g}"
