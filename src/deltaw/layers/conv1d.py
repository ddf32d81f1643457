"""GPT-2's `Conv1D` of transformers: a linear layer that stores its weight as (in, out)."""

import sys

from torch import Tensor, nn

from deltaw.layers.linear import Linear
from deltaw.state import LayerState


class Conv1D(Linear):
    """x (..., in) to y (..., out) with W stored as (in, out)."""

    kind = "conv1d"
    takes = "transformers' Conv1D"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take `transformers.pytorch_utils.Conv1D`, without importing transformers."""
        module = sys.modules.get("transformers.pytorch_utils")
        return module is not None and isinstance(layer, module.Conv1D)

    def whole(self) -> Tensor:
        """Return W (out, in) of the whole layer."""
        return self.dense().T

    def fold_whole(self, W: Tensor) -> Tensor:
        """Return W (out, in) as the layer stores it, (in, out)."""
        return W.T.contiguous()
