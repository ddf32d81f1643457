"""W + Σ L R, computed in float32 (float64) and rounded once to the dtype of the weight.

Some rows are taken at a time, so that the wide sum stays in the cache of a CPU: W is read once and
the result written once. The products are summed before W is added: one that is accumulated onto W
is rounded at every term on some processors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

GROUP_BYTES = 1 << 22


def add_products(
    W: Tensor, products: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None
) -> Tensor:
    """Return `W + Σ L R` for W (rows, columns), L (rows, r) and R (r, columns).

    The sum is in the dtype of L and R, and rounded to `dtype` where that is given.
    """
    wide = products[0][0].dtype
    new = torch.empty(W.shape, dtype=dtype or wide, device=W.device)
    rows = max(len(W), 1)
    if W.device.type == "cpu":
        rows = max(1, min(rows, GROUP_BYTES // max(W.shape[1] * wide.itemsize, 1)))
    buffer = torch.empty_like(new[:rows], dtype=wide)
    (first, second), *others = products
    for start in range(0, len(W), rows):
        some = slice(start, start + rows)
        into = new[some]
        total = torch.mm(first[some], second, out=buffer[: len(into)])
        for L, R in others:
            total.addmm_(L[some], R)
        if new.dtype == wide:
            torch.add(W[some], total, out=into)
        else:
            into.copy_(total.add_(W[some]))
    return new


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute products of float32 as such within the `with` block, where TF32 may be allowed."""
    if device.type != "cuda":
        yield
        return
    own = torch.backends.cuda.matmul
    before, own.fp32_precision = own.fp32_precision, "ieee"
    try:
        yield
    finally:
        own.fp32_precision = before


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every element is finite, in one pass without a mask of them all."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if torch.isfinite(tensor.sum()):
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
