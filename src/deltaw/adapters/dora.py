"""DoRA: W' = m ∘ (W + s B A) / ‖W + s B A‖, a magnitude m and a direction for every output.

The norm is that of each row of (out, in), and no gradient flows through it.

Source: arXiv 2402.09353, equations 5 and 11. We take the norm from the factors, without forming
B A; m starts as the norm by the same steps, so that the adapted model starts at the base's output
to the last bit. Where a start is absorbed W stands for what is left of it, and m stays ‖W‖ of the
base. Under dropout ΔW = W' - W acts on the dropped input, as PEFT has it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter, Rescaled
from deltaw.adapters import Parts
from deltaw.adapters.lora import LoraAdapter, twin_of
from deltaw.errors import TargetError
from deltaw.kernels.norms import row_norms

MAGNITUDE = "lora_magnitude_vector"


def build(parts: Parts) -> "DoraAdapter":
    """Return the DoRA adapter of one slot.

    Raises:
        TargetError: if a row of W is zero, and so has no direction.
    """
    return DoraAdapter(parts)


class DoraAdapter(LoraAdapter):
    """Hold A (r, in), B (out, r) and the magnitude m (out,)."""

    def __init__(self, parts: Parts) -> None:
        twin = twin_of(parts.extra)
        super().__init__(parts.A, parts.B, parts.scale, parts.dropout, parts.bias, twin)
        m = parts.extra.get(MAGNITUDE)
        if m is None:
            m = self.norms(parts.matrix()).to(parts.A.dtype)
        if not m.is_meta and not m.all():
            zero = ", ".join(map(str, (m == 0).nonzero().flatten().tolist()[:5]))
            raise TargetError(f"DoRA needs a direction, and output {zero} has a weight of zeros")
        self.lora_magnitude_vector = nn.Parameter(m)
        self.absorbed = parts.absorbed  # only now: m is the norm of W, the start still in it

    def norms(self, W: Tensor) -> Tensor:
        """Return ‖W + s B A‖ of every row, (out,)."""
        return row_norms(W, *self.factors(), self.scale)

    def gain(self, W: Tensor) -> Tensor:
        """Return m / ‖W + s B A‖, (out,), with the norm as a constant."""
        norms = self.norms(W)
        return self.lora_magnitude_vector.to(norms.dtype) / norms

    def merged(self, W: Tensor) -> Tensor:
        """Return m ∘ V / ‖V‖ for V = W + s B A, (out, in)."""
        V = W + super().delta(W)
        norms = torch.linalg.vector_norm(V.detach(), dim=1, keepdim=True)
        merged: Tensor = self.lora_magnitude_vector.to(V.dtype).unsqueeze(1) * V / norms
        return merged

    delta = Adapter.delta

    def forward(self, matrix: Callable[[], Tensor]) -> Rescaled:
        """Return the factors and g, without forming B A."""
        A, B = self.factors()
        return Rescaled(A, B, self.scale, self.gain(matrix()), self.bias_delta())
