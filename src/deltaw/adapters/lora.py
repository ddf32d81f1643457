"""LoRA: W' = W + s B A, a low-rank update beside the frozen weight.

Source: arXiv 2106.09685, equation 3, with s = alpha / r; arXiv 2312.03732 for s = alpha / sqrt(r).
We keep A and B in float32 whatever the base's dtype and compute in the base's (or autocast's).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter, LowRank
from deltaw.adapters import Parts


def build(parts: Parts) -> "LoraAdapter":
    """Return the LoRA adapter of one slot."""
    return LoraAdapter(parts.A, parts.B, parts.scale, parts.dropout, parts.bias)


class LoraAdapter(Adapter):
    """Hold A (r, in), B (out, r) and optionally a bias (out,) on B, all scaled by s."""

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.lora_B_bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """Return r."""
        return self.lora_A.shape[0]

    def delta(self, W: Tensor) -> Tensor:
        """Return ΔW = s B A, (out, in), in the dtype of W."""
        return (self.lora_B.to(W.dtype) * self.scale) @ self.lora_A.to(W.dtype)

    def merged(self, W: Tensor) -> Tensor:
        """Return W + s B A."""
        return W + self.delta(W)

    def bias_delta(self) -> Tensor | None:
        """Return s times the bias on B."""
        if self.lora_B_bias is None:
            return None
        dtype = torch.promote_types(torch.float32, self.lora_B_bias.dtype)
        return self.lora_B_bias.to(dtype) * self.scale

    def forward(self, matrix: Callable[[], Tensor]) -> LowRank:
        """Return the factors, without forming B A."""
        return LowRank(self.lora_A, self.lora_B, self.scale, self.bias_delta())

    def extra_repr(self) -> str:
        """Show rank and scale where the model is printed."""
        return f"r={self.rank}, scale={self.scale:g}"
