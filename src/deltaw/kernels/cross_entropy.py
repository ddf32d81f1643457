"""The loss of a causal language model without its logits.

    loss = Σ over labelled rows of (log Σ_v exp z_v - z_label) / count        z = W h + bias

Rows without a label are dropped before the output head. The rest goes through it in chunks whose
logits are written over one another, and a chunk is turned into its gradient
dh = (softmax(z) - onehot(label)) W / count at once, so that neither logits nor their gradient ever
exist as a whole and nothing is computed twice. Of a frozen head no gradient is made. The products
are in the dtype of W; exponentials and sums are in float32, for a few rows at a time, which stay in
the cache of a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.once import once

IGNORED = -100
CHUNK_BYTES = 64 << 20
CHUNK_ROWS = 128, 512
"""A chunk's logits take so many bytes, within so many rows: fewer make the product read W again and
again, more bring no further gain and take new memory from the system; measured on CPU."""
GPU_BYTES = 256 << 20
GPU_ROWS = 512, 4096
"""The same on other devices, whose products are faster the more rows they have."""
BLOCK_BYTES = 1 << 20


def linear_cross_entropy(
    h: Tensor, W: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | float
) -> Tensor:
    """Return the sum of the labelled rows' losses by `count`, a float32 (float64) scalar.

    Args:
        h: (rows, d) hidden states.
        W: (vocabulary, d), frozen, as is `bias` (vocabulary,).
        labels: (rows,) class indices; -100 for rows that do not count.
        count: what the sum is divided by.
    """
    loss: Tensor = _Loss.apply(h, W, bias, labels, count)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | float
    ) -> Tensor:
        device, dtype = W.device, W.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        W = W.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        rows = (labels != IGNORED).nonzero().squeeze(1)
        chunk = _chunk(device, len(W) * dtype.itemsize)
        total = torch.zeros((), dtype=wide, device=device)
        wanted = ctx.needs_input_grad[0]
        gradient = h.new_empty((len(rows) if wanted else 0, W.shape[1]), dtype=dtype)
        logits = h.new_empty((min(chunk, len(rows)), len(W)), dtype=dtype)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(rows), chunk):
                index = rows[start : start + chunk]
                z = logits[: len(index)]
                torch.mm(h[index].to(dtype), W.t(), out=z)
                if bias is not None:
                    z.add_(bias)
                total += _to_gradient(z, labels[index], wide)
                if wanted:
                    torch.mm(z, W, out=gradient[start : start + chunk])
        ctx.shape, ctx.dtype, ctx.count = h.shape, h.dtype, count
        ctx.save_for_backward(gradient, rows)
        return total / count

    @staticmethod
    @once("The loss of a head that computes in place", "leave deltaw.fuse_loss out.")
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        gradient = (gradient * (upstream / ctx.count)).to(ctx.dtype)
        if len(rows) != ctx.shape[0]:
            gradient = gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient)
        return gradient, None, None, None, None


def _to_gradient(z: Tensor, labels: Tensor, wide: torch.dtype) -> Tensor:
    """Return the summed loss of logits `z`, and leave softmax(z) - onehot(label) in their place."""
    block = len(z)
    if z.device.type == "cpu":
        block = _fitting(BLOCK_BYTES, z.shape[1] * wide.itemsize, (1, block))
    total = z.new_zeros((), dtype=wide)
    parts = zip(torch.split(z, block), torch.split(labels.unsqueeze(1), block), strict=True)
    for part, label in parts:
        x = part.to(wide)
        x.sub_(x.amax(1, keepdim=True))
        own = x.gather(1, label)
        norm = x.exp_().sum(1, keepdim=True)
        total += (norm.log() - own).sum()
        x.div_(norm).scatter_add_(1, label, torch.full_like(own, -1.0))
        if x is not part:
            part.copy_(x)
    return total


def _chunk(device: torch.device, row_bytes: int) -> int:
    """Return how many rows go through the head at once."""
    if device.type == "cpu":
        return _fitting(CHUNK_BYTES, row_bytes, CHUNK_ROWS)
    return _fitting(GPU_BYTES, row_bytes, GPU_ROWS)


def _fitting(budget: int, row_bytes: int, limits: tuple[int, int]) -> int:
    least, most = limits
    return min(most, max(least, budget // max(row_bytes, 1)))
