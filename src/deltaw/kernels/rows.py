"""Rows of one batch under adapters of their own, beside one product with the frozen weight.

Three ways, each equal to doing the rows of every adapter alone:

- segments, in this file: two products per adapter on its rows, wherever they lie;
- batched, in `batched.py`: two batched products over n equal groups of rows that lie together;
- masked, in `bank.py`: two products whatever n is, with n times the multiplications.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.linear import owned
from deltaw.kernels.shared import Input

Rows = slice | Tensor


class Term(NamedTuple):
    """What one adapter adds to its rows: A (r, in), B (out, r), the scale, and for the bias."""

    rows: Rows
    A: Tensor
    B: Tensor
    scale: float
    shift: Tensor | None = None


def segments(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    terms: Sequence[Term],
) -> Tensor:
    """Return the base's output plus the terms, each added to its own rows, with gradients.

    W (out, in) is the frozen weight that `base` multiplies by, and adds `bias` to; without it `y`
    is the output of a base that knows its own gradients. It can be differentiated once.
    """
    plan = tuple((term.rows, term.scale) for term in terms)
    factors = (tensor for term in terms for tensor in (term.A, term.B, term.shift))
    output: Tensor = _Segments.apply(own.x, y, W, bias, own, base, plan, *factors)  # type: ignore[no-untyped-call]
    return output


FIRST = 7
"""The place of the first A among the arguments; its B and its shift follow."""


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        own: Input,
        base: Callable[[Tensor], Tensor],
        plan: tuple[tuple[Rows, float], ...],
        *factors: Any,
    ) -> Tensor:
        output = base(own.cast) if y is None else y.clone()
        kept = []
        for j, (rows, scale) in enumerate(plan):
            A, B, shift = factors[3 * j : 3 * j + 3]
            kept.append(_add(output, own.read, Term(rows, A, B, scale, shift)))
        ctx.plan = plan
        ctx.save_for_backward(own.read, own.mask, W, *kept, *factors)
        return owned(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        read, mask, W, *saved = ctx.saved_tensors
        kept, factors = saved[: len(ctx.plan)], saved[len(ctx.plan) :]
        needed = ctx.needs_input_grad
        dtype = dY.dtype
        dX = dY.new_zeros(read.shape) if needed[0] else None
        grads: list[Tensor | None] = []
        for j, (rows, scale) in enumerate(ctx.plan):
            A, B, shift = factors[3 * j : 3 * j + 3]
            d = dY[rows].reshape(-1, dY.shape[-1])
            x = read[rows].reshape(-1, read.shape[-1])
            dS = (d @ B.to(dtype)).mul_(scale)
            first = FIRST + 3 * j
            grads += [
                (dS.t() @ x).to(A.dtype) if needed[first] else None,
                (d.t() @ kept[j]).to(B.dtype).mul_(scale) if needed[first + 1] else None,
                d.sum(0, dtype=shift.dtype) if needed[first + 2] else None,
            ]
            if dX is not None:
                _into(dX, rows, dS @ A.to(dtype))
        if dX is not None:
            if mask is not None:
                dX.mul_(mask)
            if W is not None:
                dX.view(-1, dX.shape[-1]).addmm_(dY.reshape(-1, dY.shape[-1]), W.to(dtype))
        db = dY.reshape(-1, dY.shape[-1]).sum(0) if needed[3] else None
        return dX, dY if needed[1] else None, None, db, None, None, None, *grads


def _add(y: Tensor, x: Tensor, term: Term) -> Tensor:
    """Add a term to its rows of `y` in place and return S."""
    S = x[term.rows].reshape(-1, x.shape[-1]) @ term.A.to(x.dtype).t()
    Bt = term.B.to(x.dtype).t()
    if isinstance(term.rows, slice):
        own = y[term.rows].view(-1, y.shape[-1])
        own.addmm_(S, Bt, alpha=term.scale)
        if term.shift is not None:
            own.add_(term.shift)
    else:
        part = (S @ Bt).mul_(term.scale)
        _into(y, term.rows, part if term.shift is None else part.add_(term.shift))
    return S


def _into(y: Tensor, rows: Rows, part: Tensor) -> None:
    """Add the flattened part of some rows to them in place."""
    if isinstance(rows, slice):
        own = y[rows]
        own.add_(part.view(own.shape))
    else:
        y.index_add_(0, rows, part.view(len(rows), *y.shape[1:]))
