"""`nn.ConvTranspose1d/2d/3d`: W (in, out/groups, *kernel) read as (out, in/groups · kernel).

Row o of the matrix is all that output channel o takes in, from the input channels of its group, so
that methods see outputs as rows here as everywhere. The low-rank product is a transposed
convolution with A to r channels per group, and B at every position.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.layer import AdaptedLayer
from deltaw.layers.conv import mix
from deltaw.state import LayerState
from deltaw.swap import origin_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

if TYPE_CHECKING:
    _Conv = nn.ConvTranspose2d
else:
    _Conv = object


class ConvTranspose(AdaptedLayer, _Conv):
    """x (batch, in, *space) to y (batch, out, *space'), with torch's settings and `output_size`.

    Every group has the same A (r, in/groups, *kernel), and each output its row of B (out, r).
    """

    kind = "conv_transpose"
    takes = "nn.ConvTranspose1d/2d/3d"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take the three transposed convolutions."""
        return isinstance(layer, TRANSPOSED)

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer runs the forward of one of torch's transposed convolutions."""
        return any(origin_of(layer).forward is own.forward for own in TRANSPOSED)

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in/groups · kernel)."""
        W = self.dense()
        return self.out_channels, W[:, 0].numel() // self.groups

    def matrix(self, slot: str) -> Tensor:
        """Return W as (out, in/groups · kernel)."""
        W = self.dense()
        apart = W.view(self.groups, -1, *W.shape[1:])
        return apart.transpose(1, 2).reshape(self.shape(slot))

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M in the shape of W."""
        W = self.dense()
        apart = M.view(self.groups, W.shape[1], -1, *W.shape[2:])
        return apart.transpose(1, 2).reshape(W.shape)

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Convolve with M in the shape of W."""
        return self.convolve(x, self.layout(M.to(x.dtype), slot))

    def product(self, x: Tensor, base: Tensor, slot: str) -> Tensor:
        """Return the base's output less its bias."""
        if self.bias is None:
            return base
        return base - self.per_output(self.bias.to(base.dtype), slot)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Convolve with A in each group, then mix the r channels of each with its rows of B."""
        W = self.dense()
        kernels = A.to(x.dtype).view(-1, W.shape[0] // self.groups, *W.shape[2:]).transpose(0, 1)
        S = self.convolve(x, kernels.repeat(self.groups, *[1] * (W.dim() - 1)))
        return mix(S * scale, B.to(x.dtype), self.groups, W.dim())

    def alike(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the base and add the active adapters; an `output_size` holds for both."""
        if output_size is None:
            return super().alike(input)
        return self._sized(input, output_size).alike(input)

    def _sized(self, x: Tensor, output_size: list[int]) -> "ConvTranspose":
        """Return a second object with the contents of this one, padded to give that size."""
        assert not isinstance(self.padding, str)
        lists = self.stride, self.padding, self.kernel_size, self.dilation
        stride, before, size, dilation = (list(numbers) for numbers in lists)
        space = self.dense().dim() - 2
        padding = self._output_padding(x, output_size, stride, before, size, space, dilation)
        twin = object.__new__(type(self))
        object.__setattr__(twin, "__dict__", vars(self) | {"output_padding": tuple(padding)})
        return twin

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve as the layer does, without bias."""
        assert not isinstance(self.padding, str)
        setting = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return _CONV[kernels.dim()](x, kernels, None, *setting)

    def per_output(self, v: Tensor, slot: str) -> Tensor:
        """Return v with one trailing axis per spatial axis."""
        return v.view(-1, *[1] * (self.dense().dim() - 2))

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (r, in/groups, *kernel) and (out, r)."""
        W = self.dense()
        return (r, W.shape[0] // self.groups, *W.shape[2:]), (self.out_channels, r)

    def pack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Give A the shape (r, in/groups, *kernel)."""
        return A.view(self.packed_shapes("weight", len(A))[0]), B

    def unpack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten A to (r, in/groups · kernel)."""
        return A.flatten(1), B.flatten(1)
