"""RMSNorm that keeps its input in the dtype it came in, and one number per row.

    y = w ∘ round(x n)        n = (mean(x²) + ε)^(-1/2), x and n in float32

    dx = n (g - x n² mean(g ∘ x))        g = w ∘ dy

In plain steps autograd keeps x in float32. Rows are taken in groups that stay in the cache of a
CPU. Rounding is that of transformers' LlamaRMSNorm and its many equals.
"""

from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.once import once
from deltaw.kernels.recipe import leave

GROUP = 256
"""How many rows are taken at a time on a CPU; measured."""


def rms_norm(x: Tensor, w: Tensor, eps: float, again: bool = True) -> Tensor:
    """Return the norm of `x` (..., d) with frozen weight `w` (d,).

    With `again` it says how to make it once more, where `x` is kept anyway.
    """
    y, n = _Norm.apply(x, w, eps)  # type: ignore[no-untyped-call]
    normed: Tensor = y
    kept = again and x.requires_grad
    return leave(normed, _scaled, x.detach(), w, n) if kept else normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        n = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        y = x.new_empty(x.shape)
        for part, own, into in _groups(x, n, y):
            torch.rsqrt(part.float().pow(2).mean(-1, keepdim=True).add_(eps), out=own)
            torch.mul(part, own, out=into).mul_(w)
        ctx.save_for_backward(x, w, n)
        ctx.mark_non_differentiable(n)
        return y, n

    @staticmethod
    @once("A normalisation that computes in place", "leave deltaw.fuse_blocks out.")
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        x, w, n = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        for part, own, g, into in _groups(x, n, dy, dx):
            g = (g * w).float()
            share = (g * part).mean(-1, keepdim=True).mul_(own).mul_(own)
            torch.mul(torch.addcmul(g, part.float(), share, value=-1), own, out=into)
        return dx, None, None


def _scaled(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    for part, own, into in _groups(x, n, y):
        torch.mul(part, own, out=into).mul_(w)
    return y


def _groups(*tensors: Tensor) -> Any:
    """Yield the same rows of all tensors, a group at a time on a CPU."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    size = GROUP if flat[0].device.type == "cpu" else max(len(flat[0]), 1)
    return zip(*(torch.split(rows, size) for rows in flat), strict=True)
