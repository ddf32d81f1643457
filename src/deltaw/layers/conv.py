"""`nn.Conv1d/2d/3d`: W (out, in/groups, *kernel) read as the matrix (out, in/groups · kernel)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.kernels import compute_dtype
from deltaw.kernels.conv import Setting, Term, conv
from deltaw.layer import AdaptedLayer
from deltaw.parts import Part, factors, joinable, total_scale
from deltaw.state import LayerState
from deltaw.swap import origin_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

if TYPE_CHECKING:
    _Conv = nn.Conv2d
else:
    _Conv = object


class Conv(AdaptedLayer, _Conv):
    """x (batch, in, *space) to y (batch, out, *space'); any stride, padding, dilation and groups.

    With groups, every group convolves its own channels with the same A (r, in/groups, *kernel), and
    each output channel has its row of B (out, r), so that s B A is an element of W's own space.
    """

    kind = "conv"
    takes = "nn.Conv1d/2d/3d"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take the three convolutions with factors of W's own shape."""
        return isinstance(layer, CONVOLUTIONS) and not factored(like) and not spans(layer, like)

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer runs the forward of one of torch's convolutions."""
        kind: Any = origin_of(layer)
        return any(
            kind.forward is own.forward and kind._conv_forward is own._conv_forward
            for own in CONVOLUTIONS
        )

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in/groups · kernel)."""
        W = self.dense()
        return W.shape[0], W[0].numel()

    def matrix(self, slot: str) -> Tensor:
        """Return W as (out, in/groups · kernel)."""
        return self.dense().flatten(1)

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M in the shape of W."""
        return M.reshape(self.dense().shape)

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor] | None:
        """Return B and A."""
        return B, A

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Convolve with M in the shape of W."""
        return self.convolve(x, M.to(x.dtype).view(self.dense().shape))

    def product(self, x: Tensor, base: Tensor, slot: str) -> Tensor:
        """Return the base's output less its bias."""
        if self.bias is None:
            return base
        return base - self.per_output(self.bias.to(base.dtype), slot)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Convolve with A in each group, then mix the r channels of each with its rows of B."""
        W = self.dense()
        kernels = A.to(x.dtype).view(-1, *W.shape[1:]).repeat(self.groups, *[1] * (W.dim() - 1))
        return mix(self.convolve(x, kernels) * scale, B.to(x.dtype), self.groups, W.dim())

    def fused(self, x: Tensor, parts: Sequence[Part]) -> Tensor | None:
        """Return base and parts from one kernel, for a frozen dense weight and zero padding."""
        if not self.joins():
            return None
        W = self.dense()
        if (
            self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or not (x.dim() == W.dim() and x.is_contiguous())
            or any(part.update.shift is not None for part in parts)
            or not joinable(x, parts)
        ):
            return None
        setting = Setting(self.stride, self.padding, self.dilation, self.groups)
        own = self.reading(x, parts[0].p, compute_dtype(x))
        terms = [self.term(part, own.cast.dtype) for part in parts]
        return conv(self.base, own, W, self.bias, setting, terms)

    def term(self, part: Part, dtype: torch.dtype) -> Term:
        """Return what the kernel adds for a part: kernels in every group, mixed group by group."""
        A, B = factors(part)
        W = self.dense()
        K = A.to(dtype).view(-1, *W.shape[1:]).repeat(self.groups, *[1] * (W.dim() - 1))
        return Term(K, B.to(dtype), total_scale(part), self.groups, self.groups)

    def per_output(self, v: Tensor, slot: str) -> Tensor:
        """Return v with one trailing axis per spatial axis."""
        return v.view(-1, *[1] * (self.dense().dim() - 2))

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve as the layer does, padding mode included, without bias."""
        convolved: Tensor = self._conv_forward(x, kernels, None)
        return convolved

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (r, in/groups, *kernel) and (out, r)."""
        W = self.dense()
        return (r, *W.shape[1:]), (W.shape[0], r)

    def pack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Give A the shape (r, in/groups, *kernel)."""
        return A.view(-1, *self.dense().shape[1:]), B

    def unpack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten A to (r, in/groups · kernel)."""
        return A.flatten(1), B.flatten(1)


def mix(S: Tensor, B: Tensor, groups: int, dim: int) -> Tensor:
    """Apply B (out, channels/groups) to the channels of S at every position, group by group."""
    return _CONV[dim](S, B.view(*B.shape, *[1] * (dim - 2)), groups=groups)


def factored(like: LayerState) -> bool:
    """Tell whether `like` asks for loralib's factors, which alone have a two-dimensional A."""
    A = like.tensors.get("weight.lora_A")
    return like.factored or (A is not None and A.dim() == 2)


def spans(layer: nn.Module, like: LayerState) -> bool:
    """Tell whether the A of `like` covers the input channels of all groups, as PEFT's does."""
    A = like.tensors.get("weight.lora_A")
    assert isinstance(layer, CONVOLUTIONS)
    return A is not None and layer.groups > 1 and A.dim() > 2 and A.shape[1] == layer.in_channels


def same_group(groups: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return the mask of that shape that is True where row and column are of the same group."""
    rows, columns = shape
    row = torch.arange(rows, device=device) * groups // rows
    column = torch.arange(columns, device=device) * groups // columns
    return row[:, None] == column
