"""Rows of one batch under adapters of their own, beside one product with the frozen weight.

Three ways, each equal to doing the rows of every adapter alone:

- segments: two products per adapter on its rows; the only one that trains;
- batched: with A (n, r, in) and B (n, r, out) stacked, two batched products over n equal groups of
  rows that lie together;
- masked: S = x [A_1; ...; A_n]ᵀ for all rows, zero where an adapter is another row's, then
  S [B_1; ...; B_n]: two products whatever n is, n times the multiplications.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltaw.kernels import factor_dtype
from deltaw.kernels.shared import Input

Rows = slice | Tensor


class Term(NamedTuple):
    """What one adapter adds to its rows: A (r, in), B (out, r), the scale, and for the bias."""

    rows: Rows
    A: Tensor
    B: Tensor
    scale: float
    shift: Tensor | None = None


class Bank(NamedTuple):
    """Factors of n adapters stacked, in the dtype that is computed in; ranks are padded with zeros.

    A (n, r, in) with its scale, B (n, r, out), and `shift` (n, 1, out) where any adapter has one.
    """

    A: Tensor
    B: Tensor
    shift: Tensor | None


def stacked(terms: Sequence[Any], dtype: torch.dtype) -> Bank:
    """Return A, B, scale and shift of all terms in one bank; None adds nothing."""
    known = [term for term in terms if term is not None]
    rank = max(len(term.A) for term in known)
    bank = Bank(
        known[0].A.new_zeros((len(terms), rank, known[0].A.shape[1]), dtype=dtype),
        known[0].B.new_zeros((len(terms), rank, len(known[0].B)), dtype=dtype),
        known[0].B.new_zeros((len(terms), 1, len(known[0].B)), dtype=dtype)
        if any(term.shift is not None for term in known)
        else None,
    )
    for place, term in enumerate(terms):
        if term is not None:
            r = len(term.A)
            torch.mul(term.A, term.scale, out=bank.A[place, :r])
            bank.B[place, :r].copy_(term.B.t())
            if term.shift is not None and bank.shift is not None:
                bank.shift[place, 0].copy_(term.shift)
    return bank


def bank_dtype(x: Tensor, n: int, together: bool) -> torch.dtype:
    """Return the dtype in which n stacked adapters multiply the rows of `x`, together or masked.

    Batched products are faster in float32 up to 4 rows per adapter, masked ones up to 8 in all.
    """
    return factor_dtype(x, 4 * n if together else 8)


def add_batched(y: Tensor, x: Tensor, bank: Bank) -> None:
    """Add to `y` in place, for rows that lie together in n equal groups."""
    n, dtype = len(bank.A), bank.A.dtype
    groups = y.view(n, -1, y.shape[-1])
    S = torch.bmm(x.reshape(n, -1, x.shape[-1]).to(dtype), bank.A.mT)
    if dtype == y.dtype:
        groups.baddbmm_(S, bank.B)
    else:
        groups.add_(torch.bmm(S, bank.B))
    if bank.shift is not None:
        groups.add_(bank.shift)


def add_masked(y: Tensor, x: Tensor, bank: Bank, index: Tensor) -> None:
    """Add to `y` in place; `index` (rows,) is the adapter of each row, n for none."""
    n, rank, width = bank.A.shape
    dtype = bank.A.dtype
    own = F.one_hot(index, n + 1)[:, :n].to(dtype)
    S = x.reshape(-1, width).to(dtype) @ bank.A.view(-1, width).t()
    S.view(len(index), -1, n, rank).mul_(own[:, None, :, None])
    flat, B = y.view(-1, y.shape[-1]), bank.B.view(n * rank, -1)
    if dtype == y.dtype:
        flat.addmm_(S, B)
    else:
        flat.add_(S @ B)
    if bank.shift is not None:
        y.view(len(index), -1, y.shape[-1]).add_((own @ bank.shift.squeeze(1)).unsqueeze(1))


def add_segments(y: Tensor, x: Tensor, terms: Sequence[Term]) -> None:
    """Add to `y` in place, the rows of one adapter after those of another."""
    for term in terms:
        _add(y, x, term)


def segments(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    terms: Sequence[Term],
) -> Tensor:
    """Return the base's output plus the terms, each added to its own rows, with gradients.

    W (out, in) is the frozen weight that `base` multiplies by; without it `y` is the output of a
    base that knows its own gradients. It can be differentiated once.
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
        output = output.clone() if output._is_view() else output
        kept = []
        for j, (rows, scale) in enumerate(plan):
            A, B, shift = factors[3 * j : 3 * j + 3]
            kept.append(_add(output, own.read, Term(rows, A, B, scale, shift)))
        ctx.plan = plan
        ctx.save_for_backward(own.read, own.mask, W, *kept, *factors)
        return output

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
