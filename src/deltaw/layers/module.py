"""Any module of which only parameters are trained in full: no slot, its own forward."""

from typing import Any

from torch import Tensor, nn

from deltaw.layer import AdaptedLayer
from deltaw.state import LayerState


class TrainedModule(AdaptedLayer):
    """A module whose biases or head weights are read from their trained copies."""

    kind = "module"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take whatever is asked for by kind: any module has parameters."""
        return like.kind == cls.kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original forward, which reads the trained copies."""
        return self.base(*args, **kwargs)
