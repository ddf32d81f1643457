"""loralib's convolution: a factorisation of W.reshape(out/groups · k^⌊d/2⌋, in · k^⌈d/2⌉).

loralib writes it for square kernels of two dimensions, where both exponents are 1; its own one-
and three-dimensional classes fail on their shapes, and the exponents here are what makes them fit.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from deltaw.adapter import Rescaled
from deltaw.layers.conv import CONVOLUTIONS, Conv, factored
from deltaw.parts import Part
from deltaw.state import LayerState


class FactoredConv(Conv):
    """A convolution whose ΔW = (B A).view(W.shape) with A (R, columns) and B (rows, R)."""

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take convolutions asked for as loralib factors them."""
        return isinstance(layer, CONVOLUTIONS) and factored(like)

    @classmethod
    def refusals(cls, layer: nn.Module) -> list[str]:
        """Refuse kernels with unequal sides."""
        assert isinstance(layer, CONVOLUTIONS)
        if len(set(layer.kernel_size)) > 1:
            return [f"loralib's factors need equal kernel sides, not {layer.kernel_size}"]
        return super().refusals(layer)

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out/groups · k^⌊d/2⌋, in · k^⌈d/2⌉)."""
        return factored_shape(self)

    def matrix(self, slot: str) -> Tensor:
        """Return W reshaped."""
        return self.dense().reshape(self.shape(slot))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Convolve with scale B A, which has no cheaper form in this shape."""
        return self.act(x, (B.to(x.dtype) * scale) @ A.to(x.dtype), slot)

    def rescaled(self, x: Tensor, update: Rescaled, slot: str, base: Tensor | None) -> Tensor:
        """Convolve with ΔW, whose rows are no outputs in this shape."""
        return self.act(x, update.matrix(self.matrix(slot)), slot)

    def fused(self, x: Tensor, parts: Sequence[Part]) -> None:
        """Return None: B A must be formed to be convolved with."""

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the factors themselves."""
        rows, columns = self.shape(slot)
        return (r, columns), (rows, r)

    def pack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Keep both factors as they are."""
        return A, B


def factored_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the shape into which loralib reshapes the weight of a convolution."""
    assert isinstance(layer, CONVOLUTIONS)
    dims, k = len(layer.kernel_size), layer.kernel_size[0]
    rows = layer.out_channels // layer.groups * k ** (dims // 2)
    return rows, layer.in_channels * k ** (dims - dims // 2)
