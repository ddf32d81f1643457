"""GPT-2's `Conv1D` of transformers: a linear layer that stores its weight as (in, out)."""

import sys

from torch import Tensor, nn

from deltaw.layers.linear import Linear
from deltaw.state import LayerState
from deltaw.swap import origin_of


class Conv1D(Linear):
    """x (..., in) to y (..., out) with W stored as (in, out)."""

    kind = "conv1d"
    takes = "transformers' Conv1D"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take `transformers.pytorch_utils.Conv1D`, without importing transformers."""
        module = sys.modules.get("transformers.pytorch_utils")
        return module is not None and isinstance(layer, module.Conv1D)

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer runs the forward of transformers' `Conv1D`."""
        known = sys.modules["transformers.pytorch_utils"].Conv1D
        return bool(origin_of(layer).forward is known.forward)

    def whole(self) -> Tensor:
        """Return W (out, in) of the whole layer."""
        return self.dense().T

    def extent(self) -> tuple[int, int]:
        """Return (out, in) of the whole layer."""
        into, out = self.dense_shape()
        return out, into

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M (out, in) as the layer stores it, (in, out)."""
        return super().layout(M, slot).T.contiguous()

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """Return Aᵀ, and Bᵀ among columns of zeros."""
        B, A = super().thin(A, B, slot)
        return A.T, B.T
