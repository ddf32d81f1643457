"""Adapters that train together on n equal groups of rows, in one node of the autograd graph.

With A (n, r, in), B (n, out, r), and x and y seen as n groups:

    y_k = base(x)_k + S_k B_kᵀ        S_k = x_k (s_k A_k)ᵀ

Every product of `linear.py` becomes one batched product, so that four adapters cost little more
than one; ranks are padded with zeros, whose gradients are dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.linear import Term, owned
from deltaw.kernels.shared import Input


def batched(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    terms: Sequence[Term | None],
) -> Tensor:
    """Return the base's output plus term k on group k, with gradients; None adds nothing.

    W (out, in) is the frozen weight that `base` multiplies by, and adds `bias` to; without it `y`
    is the output of a base that knows its own gradients. It can be differentiated once.
    """
    scales = tuple(0.0 if term is None else term.scale for term in terms)
    factors: list[Tensor | None] = []
    for term in terms:
        factors += (None, None, None) if term is None else (term.A, term.B, term.shift)
    output: Tensor = _Batched.apply(own.x, y, W, bias, own, base, scales, *factors)  # type: ignore[no-untyped-call]
    return output


FIRST = 7
"""The place of the first A among the arguments; its B and its shift follow."""


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        own: Input,
        base: Callable[[Tensor], Tensor],
        scales: tuple[float, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        read, n = own.read, len(scales)
        output = base(own.cast) if y is None else y.clone()
        A, B = _stacked(scales, factors, read.dtype)
        S = torch.bmm(read.reshape(n, -1, read.shape[-1]), A.mT)
        groups = output.view(n, -1, output.shape[-1])
        groups.baddbmm_(S, B.mT)
        for group, shift in zip(groups, factors[2::3], strict=True):
            if shift is not None:
                group.add_(shift)
        ctx.scales = scales
        ctx.save_for_backward(read, own.mask, W, S, *factors)
        return owned(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        read, mask, W, S, *factors = ctx.saved_tensors
        needed, n = ctx.needs_input_grad, len(ctx.scales)
        A, B = _stacked(ctx.scales, factors, dY.dtype)
        flat = dY.reshape(-1, dY.shape[-1])
        d = flat.view(n, -1, dY.shape[-1])
        dS = torch.bmm(d, B)
        dA = torch.bmm(dS.mT, read.reshape(n, -1, read.shape[-1]))
        dBt = torch.bmm(S.mT, d)
        grads: list[Tensor | None] = []
        for k, scale in enumerate(ctx.scales):
            own_A, own_B, shift = factors[3 * k : 3 * k + 3]
            need_A, need_B, need_shift = needed[FIRST + 3 * k : FIRST + 3 * k + 3]
            r = 0 if own_A is None else len(own_A)
            grads += [
                torch.mul(dA[k, :r], scale, out=torch.empty_like(own_A)) if need_A else None,
                torch.empty_like(own_B).copy_(dBt[k, :r].t()) if need_B else None,
                d[k].sum(0, dtype=shift.dtype) if need_shift else None,
            ]
        dX = _input(dS, A, mask, flat, W).view(read.shape) if needed[0] else None
        db = flat.sum(0) if needed[3] else None
        return dX, dY if needed[1] else None, None, db, None, None, None, *grads


def _input(dS: Tensor, A: Tensor, mask: Tensor | None, d: Tensor, W: Tensor | None) -> Tensor:
    """Return the gradient of the input: of the adapters, masked, and of the base."""
    n, _, into = A.shape
    if W is None:
        dX = torch.bmm(dS, A).view(-1, into)
        return dX if mask is None else dX.mul_(mask.view(-1, into))
    if mask is None:
        dX = d @ W.to(d.dtype)
        dX.view(n, -1, into).baddbmm_(dS, A)
        return dX
    dX = torch.bmm(dS, A).view(-1, into).mul_(mask.view(-1, into))
    return dX.addmm_(d, W.to(d.dtype))


def _stacked(
    scales: Sequence[float], factors: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A (n, r, in), scaled, and B (n, out, r) of all terms, zeros beyond lower ranks."""
    ranks = [0 if A is None else len(A) for A in factors[::3]]
    rank = max(ranks)
    whole = next(k for k, r in enumerate(ranks) if r == rank)
    like_A, like_B = factors[3 * whole], factors[3 * whole + 1]
    assert like_A is not None and like_B is not None
    make = torch.empty if min(ranks) == rank else torch.zeros
    n, device = len(ranks), like_A.device
    A = make((n, rank, like_A.shape[1]), dtype=dtype, device=device)
    B = make((n, len(like_B), rank), dtype=dtype, device=device)
    for k, (r, scale) in enumerate(zip(ranks, scales, strict=True)):
        own_A, own_B = factors[3 * k], factors[3 * k + 1]
        if own_A is not None and own_B is not None:
            torch.mul(own_A, scale, out=A[k, :r])
            B[k, :, :r].copy_(own_B)
    return A, B
