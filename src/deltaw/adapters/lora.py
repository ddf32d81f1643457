"""LoRA: W' = W + s B A, a low-rank update beside the frozen weight.

Source: arXiv 2106.09685, equation 3, with s = alpha / r; arXiv 2312.03732 for s = alpha / sqrt(r).
We keep A and B in float32 whatever the base's dtype and compute in the base's (or autocast's).

A start whose B0 A0 is not zero (PiSSA, OLoRA, ...) leaves W as it is and subtracts it again,

    W' = W + s (B A - B0 A0) = W + s ((B - B0) A + B0 (A - A0)),

where the papers rewrite W to W - s B0 A0. The output is the base's to the last bit until the first
step, in any dtype, since the differences are taken in float32. `attach(..., absorb=...)` rewrites W
as the papers do, and ΔW = s B A is on top of that.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter, LowRank, Update
from deltaw.adapters import Parts
from deltaw.state import without_twin


def build(parts: Parts) -> "LoraAdapter":
    """Return the LoRA adapter of one slot."""
    twin = twin_of(parts.extra)
    return LoraAdapter(
        parts.A, parts.B, parts.scale, parts.dropout, parts.bias, twin, absorbed=parts.absorbed
    )


def twin_of(extra: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return A0 and B0 where the adapter has them."""
    return (extra["start_A"], extra["start_B"]) if "start_A" in extra else None


class LoraAdapter(Adapter):
    """Hold A (r, in), B (out, r) and optionally a bias (out,) on B, all scaled by s.

    Stacked experts have a leading axis in A and B.

    `twin` is the frozen A0 and B0 of a start that is subtracted, or was where it is `absorbed`.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        twin: tuple[Tensor, Tensor] | None = None,
        *,
        absorbed: bool = False,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.lora_B_bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout
        self.twin = twin is not None
        self.absorbed = absorbed
        if twin is not None:
            self.register_buffer("start_A", twin[0])
            self.register_buffer("start_B", twin[1])

    @property
    def rank(self) -> int:
        """Return r."""
        return self.lora_A.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B with ΔW = s B A: those held, or [A; A - A0] and [B - B0, B0]."""
        A, B = self.lora_A, self.lora_B
        if self.absorbed or not self.twin:
            return A, B
        return without_twin(A, B, self.start_A, self.start_B)

    def delta(self, W: Tensor) -> Tensor:
        """Return ΔW = s B A, (out, in), in the dtype of W."""
        A, B = self.factors()
        return (B.to(W.dtype) * self.scale) @ A.to(W.dtype)

    def merged(self, W: Tensor) -> Tensor:
        """Return W + s B A."""
        return W + self.delta(W)

    def bias_delta(self) -> Tensor | None:
        """Return s times the bias on B."""
        if self.lora_B_bias is None:
            return None
        dtype = torch.promote_types(torch.float32, self.lora_B_bias.dtype)
        return self.lora_B_bias.to(dtype) * self.scale

    def forward(self, matrix: Callable[[], Tensor]) -> Update:
        """Return the factors, without forming B A."""
        A, B = self.factors()
        return LowRank(A, B, self.scale, self.bias_delta())

    def extra_repr(self) -> str:
        """Show rank and scale where the model is printed."""
        return f"r={self.rank}, scale={self.scale:g}"
