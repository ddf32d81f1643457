"""PEFT's grouped convolution: A covers the input channels of all groups.

Its ΔW couples channels that W does not, so the slot is W spread out to one dense matrix
(out, in · kernel) with zeros between groups. Such a file works in the forward pass; it merges only
where nothing of ΔW lies between groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import MergeError
from deltaw.kernels.conv import Term
from deltaw.layers.conv import CONVOLUTIONS, Conv, mix, same_group, spans
from deltaw.parts import Part, factors, total_scale
from deltaw.state import LayerState


class SpanningConv(Conv):
    """A grouped convolution with A (R, in, *kernel) and B (out, R), zero between groups."""

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take grouped convolutions whose A covers every input channel."""
        return isinstance(layer, CONVOLUTIONS) and spans(layer, like)

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in · kernel)."""
        W = self.dense()
        return W.shape[0], W[0].numel() * self.groups

    def matrix(self, slot: str) -> Tensor:
        """Return W spread out over the input channels of all groups."""
        W = self.dense()
        mask = same_group(self.groups, self.shape(slot), W.device)
        return torch.where(mask, W.flatten(1).repeat(1, self.groups), 0)

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M in the shape of W; raise where anything of it lies between groups."""
        mask = same_group(self.groups, (M.shape[0], M.shape[1]), M.device)
        if M.masked_fill(mask, 0).any():
            raise MergeError(
                "ΔW couples input channels of other groups, which the grouped weight cannot hold"
            )
        return M[mask].view(self.dense().shape)

    def thin(self, A: Tensor, B: Tensor, slot: str) -> None:
        """Return None: what lies between groups must be seen."""

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Convolve with M over all input channels."""
        return self.convolve(x, M.to(x.dtype).view(M.shape[0], -1, *self.dense().shape[2:]))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Convolve with A over all channels; each group then sees its own part of the R."""
        W = self.dense()
        S = self.convolve(x, A.to(x.dtype).view(A.shape[0], -1, *W.shape[2:]))
        return mix(S * scale, self.compact(B).to(x.dtype), self.groups, W.dim())

    def term(self, part: Part, dtype: torch.dtype) -> Term:
        """Return what the kernel adds for a part: kernels over all channels, mixed by group."""
        A, B = factors(part)
        K = A.to(dtype).view(A.shape[0], -1, *self.dense().shape[2:])
        return Term(K, self.compact(B).to(dtype), total_scale(part), 1, self.groups)

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve as the layer does but with one group."""
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = self.padding if self.padding_mode == "zeros" else 0
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernels.dim()]
        return conv(x, kernels, None, self.stride, padding, self.dilation)

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (R, in, *kernel) and (out, R/groups)."""
        W = self.dense()
        return (r, W.shape[1] * self.groups, *W.shape[2:]), (W.shape[0], r // self.groups)

    def pack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Give A the shape (R, in, *kernel) and B (out, R/groups)."""
        return A.view(A.shape[0], -1, *self.dense().shape[2:]), self.compact(B)

    def unpack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten A, and spread the rows of B (out, R/groups) over the R channels of A."""
        B = B.flatten(1)
        mask = same_group(self.groups, (B.shape[0], A.shape[0]), B.device)
        return A.flatten(1), torch.where(mask, B.repeat(1, self.groups), 0)

    def compact(self, B: Tensor) -> Tensor:
        """Return the blocks of B (out, R) as (out, R/groups); the zeros between get no gradient."""
        out, R = B.shape
        blocks = B.view(self.groups, out // self.groups, self.groups, R // self.groups)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(out, R // self.groups)
