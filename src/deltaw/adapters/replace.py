"""Full copies: P' = trained, for biases and heads trained beside the frozen original."""

from typing import ClassVar

from torch import Tensor, nn

from deltaw.adapter import Adapter


class ReplaceAdapter(Adapter):
    """Hold a trained copy of one parameter, or the running copy of one buffer, of a layer."""

    replaces: ClassVar[bool] = True

    def __init__(self, trained: Tensor) -> None:
        super().__init__()
        if isinstance(trained, nn.Parameter):
            self.trained = trained
        else:
            self.register_buffer("trained", trained)

    def merged(self, W: Tensor) -> Tensor:
        """Return the copy."""
        return self.trained

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return the copy; it is read by a call, so that hooks of the adapter take part."""
        return self.trained
