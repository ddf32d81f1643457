"""The input's gradient of a linear map whose own product has none: dX = dY W.

The stored weight is unpacked once, in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear_in(
    x: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor], Tensor],
    weight: Callable[[], Tensor],
) -> Tensor:
    """Return `product(x)`, with gradients of x and bias.

    Args:
        x: the input (..., in).
        bias: (out,), which the product adds.
        product: computes x Wᵀ + bias.
        weight: returns W (out, in) as a dense tensor.
    """
    output: Tensor = _Frozen.apply(x, bias, product, weight)  # type: ignore[no-untyped-call]
    return output


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        product: Callable[[Tensor], Tensor],
        weight: Callable[[], Tensor],
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        need_x, need_bias, *_ = ctx.needs_input_grad
        dX = (dY @ ctx.weight().to(dY.dtype)).to(ctx.dtype) if need_x else None
        db = None
        if need_bias:
            db = dY.reshape(-1, dY.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return dX, db, None, None
