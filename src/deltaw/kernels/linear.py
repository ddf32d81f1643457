"""A linear map and the low-rank product beside it, in one node of the autograd graph.

    y = base(x) + S Bᵀ        S = (x ∘ mask) (scale A)ᵀ

Forward: the base product, then one accumulating product into it. Kept for the backward pass: the
adapter's input, which is the layer's own tensor unless dropout makes another, and the thin S. With
dS = dY B computed once: dA = scale dSᵀ (x ∘ mask), dB = dYᵀ S, dX = (dS scale A) ∘ mask + dY W.
That is 3 r (in + out) multiplications per token beside the base's, no copy of x in float32 and no
pass over (tokens x out) of its own. A and B, in whatever dtype they are kept, are cast once in each
direction.

Where W is a dense tensor the base product is part of the node. Otherwise the caller computes it,
and the sum is another tensor.

With a gain g of every output, as DoRA has it, y = g ∘ z + b for z = W x + S Bᵀ. Then y is kept too,
which the next step often keeps anyway: dg = Σ dY ∘ (y - b) / g, and dZ = g ∘ dY stands for dY.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import factor_dtype
from deltaw.kernels.recipe import Recipe
from deltaw.kernels.shared import Input, Left


class Term(NamedTuple):
    """What adapters add: A (r, in) and B (out, r) in any dtype, their scale, and for the bias."""

    A: Tensor
    B: Tensor
    scale: float
    shift: Tensor | None = None


def linear(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor,
    bias: Tensor | None,
    term: Term,
    gain: Tensor | None = None,
) -> Tensor:
    """Return `base(x)` plus the term, for a base that computes x Wᵀ + bias.

    Args:
        base: the layer's own forward; it is called on `own.cast`, without gradients.
        own: the input (..., in) in the dtype that is computed in.
        W: (out, in), frozen.
        bias: (out,), which the base adds.
        term: what is added.
        gain: (out,), what the sum without bias and shift is multiplied by.
    """
    A, B, _, shift = term
    output: Tensor = _Low.apply(own.x, None, W, bias, A, B, shift, gain, term, own, base)  # type: ignore[no-untyped-call]
    return output


def add_low_rank(
    y: Tensor, own: Input, term: Term, bias: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """Return the term plus `y`, the output of a base that knows its own gradients.

    `bias` is in y already, and left out of what a gain multiplies.
    """
    A, B, _, shift = term
    output: Tensor = _Low.apply(own.x, y, None, bias, A, B, shift, gain, term, own, None)  # type: ignore[no-untyped-call]
    return output


def add_in_place(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Add a low-rank product of x (..., in) to y (..., out).

    No gradient flows; the product is in float32 until it is added where that is faster.
    """
    dtype = factor_dtype(x)
    if dtype == x.dtype:
        S = _rows(x) @ _times(A, scale, dtype).t()
        y.view(-1, y.shape[-1]).addmm_(S, B.to(dtype).t())
    else:
        S = F.linear(x.to(dtype), A if A.dtype == dtype else A.to(dtype))
        y.add_(F.linear(S, B if B.dtype == dtype else B.to(dtype)), alpha=scale)


def rescale(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """Turn y = z + bias (..., out) into gain ∘ z + bias in place; a gain of 1 changes no bit."""
    excess = gain - 1
    y.addcmul_(y, excess.to(y.dtype))
    if bias is not None:
        y.sub_((excess * bias).to(y.dtype))


def _forward(
    base: Callable[[Tensor], Tensor] | None,
    y: Tensor | None,
    own: Input,
    term: Term,
    gain: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the sum, as a tensor that may be changed in place, and S.

    S comes first, while x is still in the cache.
    """
    A, B, scale, shift = term
    read = own.read
    dtype = read.dtype
    S = _rows(read) @ _times(A, scale, dtype).t()
    if base is not None:
        y = base(own.cast)
    else:
        assert y is not None
        y = y.clone()
    flat = y.view(-1, y.shape[-1])
    flat.addmm_(S, B.to(dtype).t())
    if gain is not None:
        rescale(flat, gain, bias)
    if shift is not None:
        flat.add_(shift)
    return owned(y), S


def owned(y: Tensor) -> Tensor:
    """Return `y`, of which nobody else knows, as a tensor that autograd takes for no view."""
    if not y._is_view():
        return y
    flat = y.view(-1, y.shape[-1])
    return torch.ops.aten._unsafe_view(flat, y.shape)  # type: ignore[no-any-return]


CHANGED = (
    "The output of a layer under DoRA was changed in place, and its magnitude's gradient needs it."
    "\nFix: leave that step out of place, as in nn.ReLU(inplace=False)."
)


class _Low(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        shift: Tensor | None,
        gain: Tensor | None,
        term: Term,
        own: Input,
        base: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        y, S = _forward(base, y, own, term, gain, bias)
        need_x, _, _, _, need_A, need_B, _, need_gain, *_ = ctx.needs_input_grad
        recipe = own.recipe if need_A else None
        ctx.scale, ctx.pool = term.scale, own.pool
        ctx.make = recipe.make if recipe else None
        ctx.version = y._version
        ctx.rewritten = own.mask is not None or own.cast.dtype != x.dtype or recipe is not None
        ctx.save_for_backward(
            own.read if need_A and recipe is None else None,
            own.mask if need_x or recipe else None,
            W if need_x else None,
            S if need_B else None,
            A,
            B,
            shift,
            gain,
            y if need_gain else None,
            bias if gain is not None else None,
            *(recipe.of if recipe else ()),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dY)
        read, mask, W, S, A, B, shift, gain, y, bias, *of = ctx.saved_tensors
        need_x, need_y, _, need_bias, need_A, need_B, need_shift, *_ = ctx.needs_input_grad
        d = _rows(dY)
        dtype = d.dtype
        db = d.sum(0) if need_bias else None
        dshift = d.sum(0, dtype=shift.dtype) if need_shift else None
        dA = dB = dgain = spare = None
        if gain is not None:
            excess = gain - 1
            if y is not None:
                if y._version != ctx.version:
                    raise RuntimeError(CHANGED)
                spare = d * _rows(y)
                dgain = _gain_gradient(spare.sum(0), d, gain, [bias, shift])
            if need_y and db is not None:
                db = -excess * db
            d = torch.addcmul(d, d, excess.to(dtype), out=spare)
        if need_B:
            dB = torch.empty_like(B).copy_((S.t() @ d).t())
        if need_A or need_x:
            dS = d @ B.to(dtype)
            if need_A:
                if ctx.make is not None:
                    read = ctx.pool.made(Recipe(ctx.make, tuple(of)))
                    read = read if mask is None else read * mask
                dA = _times(dS.t() @ _rows(read), ctx.scale, A.dtype)
            if need_x:
                W = None if W is None else W.to(dtype)
                ctx.pool.leave(Left(dS, _times(A, ctx.scale, dtype), mask, d, W))
        dy = d.view(dY.shape) if need_y else None
        return None, dy, None, db, dA, dB, dshift, dgain, None, None, None


def _gain_gradient(dy: Tensor, d: Tensor, gain: Tensor, added: list[Tensor | None]) -> Tensor:
    """Return Σ d ∘ z (out,) over the rows from dy = Σ d ∘ y, for y = gain ∘ z plus `added`."""
    total = dy.to(gain.dtype)
    for vector in added:
        if vector is not None:
            total = total - vector * d.sum(0)
    return total / gain


def _differentiable_backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    """Return the same gradients in steps that can be differentiated again."""
    read, _, W, _, A, B, shift, gain, *_ = ctx.saved_tensors
    _, need_y, _, need_bias, _, need_B, need_shift, *_ = ctx.needs_input_grad
    if ctx.rewritten or gain is not None or (read is None and need_B):
        raise RuntimeError(
            "An adapted linear layer cannot be differentiated twice under dropout, under autocast, "
            "after deltaw.fuse_blocks, while its lora_A is frozen, or with DoRA.\n"
            "Fix: leave that for a pass which is differentiated twice."
        )
    d = _rows(dY)
    dS = ctx.scale * d @ B.to(d.dtype)
    dX = dS @ A.to(d.dtype)
    if W is not None:
        dX = dX + d @ W
    dA = dB = None
    if read is not None:
        x = _rows(read)
        dA = (dS.t() @ x).to(A.dtype)
        dB = (ctx.scale * d.t() @ (x @ A.t().to(x.dtype))).to(B.dtype)
    db = d.sum(0) if need_bias else None
    dshift = d.sum(0, dtype=shift.dtype) if need_shift else None
    dX = dX.reshape(*dY.shape[:-1], -1)
    return dX, dY if need_y else None, None, db, dA, dB, dshift, None, None, None, None


def _times(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return `scale * tensor` in `dtype`, in one pass."""
    return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
