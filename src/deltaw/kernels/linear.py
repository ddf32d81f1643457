"""A linear map and what adapters add to it, in one node of the autograd graph.

    y = base(x) + Σ (x ∘ mask) (s_j A_j)ᵀ B_jᵀ        S_j = (x ∘ mask) (s_j A_j)ᵀ

Forward: the base product, then one accumulating product per adapter into it. Kept for the backward
pass: the adapters' input, which is the layer's own tensor unless dropout makes another, and the
thin S. With dS_j = dY B_j computed once: dA_j = s_j dS_jᵀ (x ∘ mask), dB_j = dYᵀ S_j and
dX = (Σ s_j dS_j A_j) ∘ mask + dY W. That is 4 r (in + out) multiplications per token beside the
base's, no copy of x in float32 and no pass over (tokens x out) of its own. A and B may be kept in
another dtype than x; they are cast once, A with its scale.

Where W is a dense tensor the base product is part of the node, and is accumulated into in place.
Otherwise the caller computes it, and the sum is another tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.shared import Input, Left, Pool


class Term(NamedTuple):
    """What one adapter adds: `scale` x Aᵀ Bᵀ and `shift` to columns `start` to `stop` of y."""

    A: Tensor
    B: Tensor
    scale: float
    start: int
    stop: int
    shift: Tensor | None = None


def linear(
    base: Callable[[Tensor], Tensor],
    own: Input,
    pool: Pool,
    W: Tensor,
    bias: Tensor | None,
    terms: Sequence[Term],
) -> Tensor:
    """Return `base(x)` plus the terms, for a base that computes x Wᵀ + bias.

    Args:
        base: the layer's own forward; it is called on `own.cast`, without gradients.
        own: the input (..., in) in the dtype that is computed in; its `x` is linked to `pool`.
        pool: where the gradient of the input is left.
        W: (out, in), frozen.
        bias: (out,), which the base adds.
        terms: A (r, in), B (out_j, r) and `shift` (out_j,) of each adapter, in any dtype.
    """
    return _apply(own, pool, None, W, bias, base, terms)


def add_low_rank(y: Tensor, own: Input, pool: Pool, terms: Sequence[Term]) -> Tensor:
    """Return the terms plus `y`, the output of a base that knows its own gradients."""
    return _apply(own, pool, y, None, None, None, terms)


class _Setup(NamedTuple):
    own: Input
    pool: Pool
    base: Callable[[Tensor], Tensor] | None
    places: tuple[tuple[float, int, int], ...]


def _apply(
    own: Input,
    pool: Pool,
    y: Tensor | None,
    W: Tensor | None,
    bias: Tensor | None,
    base: Callable[[Tensor], Tensor] | None,
    terms: Sequence[Term],
) -> Tensor:
    setup = _Setup(own, pool, base, tuple((term.scale, term.start, term.stop) for term in terms))
    factors = (tensor for term in terms for tensor in (term.A, term.B, term.shift))
    output: Tensor = _Low.apply(own.x, y, W, bias, setup, *factors)  # type: ignore[no-untyped-call]
    return output


FIRST = 5
"""The place of the first A among the arguments; after it come its B and its shift."""


class _Low(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        setup: _Setup,
        *factors: Any,
    ) -> Tensor:
        own, pool, base, places = setup
        if base is not None:
            y = base(own.cast)
        assert y is not None
        flat = y.view(-1, y.shape[-1])
        A = _scaled(factors[0::3], places, own.cast.dtype)
        S = _rows(own.read) @ A.t()
        for j, part in enumerate(_split(S, factors[0::3], 1)):
            _, start, stop = places[j]
            B, shift = factors[3 * j + 1 : 3 * j + 3]
            if base is None and j == 0:
                flat = flat.clone()
            columns = _columns(flat, start, stop)
            columns.addmm_(part, B.to(part.dtype).t())
            if shift is not None:
                columns.add_(shift)
        y = _no_view(flat, y.shape)
        needed = ctx.needs_input_grad
        ctx.places, ctx.pool = places, pool
        ctx.rewritten = own.mask is not None or own.cast.dtype != x.dtype
        ctx.save_for_backward(
            own.read if any(needed[FIRST::3]) else None,
            own.mask if needed[0] else None,
            W if needed[0] else None,
            S if any(needed[FIRST + 1 :: 3]) else None,
            *factors,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dY)
        read, mask, W, S, *factors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d = _rows(dY)
        dtype = d.dtype
        parts = [
            _columns(d, start, stop) @ B.to(dtype)
            for (_, start, stop), B in zip(ctx.places, factors[1::3], strict=True)
        ]
        dS = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        grads: list[Tensor | None] = [None] * len(factors)
        if any(needed[FIRST::3]):
            for j, dA in enumerate(_split(dS.t() @ _rows(read), factors[0::3], 0)):
                grads[3 * j] = dA.to(factors[3 * j].dtype).mul_(ctx.places[j][0])
        if S is not None:
            for j, thin in enumerate(_split(S, factors[0::3], 1)):
                columns = _columns(d, *ctx.places[j][1:])
                grads[3 * j + 1] = torch.empty_like(factors[3 * j + 1]).copy_(
                    (thin.t() @ columns).t()
                )
        for j, (_, start, stop) in enumerate(ctx.places):
            if needed[FIRST + 3 * j + 2]:
                shift = factors[3 * j + 2]
                grads[3 * j + 2] = _columns(d, start, stop).sum(0, dtype=shift.dtype)
        if needed[0]:
            A = _scaled(factors[0::3], ctx.places, dtype)
            ctx.pool.leave(Left(dS, A, mask, d, None if W is None else W.to(dtype)))
        db = d.sum(0) if needed[3] else None
        return None, dY if needed[1] else None, None, db, None, *grads


def _differentiable_backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    """Return the same gradients in steps that can be differentiated again."""
    read, _, W, _, *factors = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if ctx.rewritten or (read is None and any(needed[FIRST + 1 :: 3])):
        raise RuntimeError(
            "An adapted linear layer cannot be differentiated twice under dropout or autocast, "
            "nor while its lora_A is frozen.\nFix: call model.eval(), leave autocast or let "
            "lora_A require gradients for a pass that is differentiated twice."
        )
    d = _rows(dY)
    dX = d.new_zeros(()) if W is None else d @ W
    grads: list[Tensor | None] = []
    for j, (scale, start, stop) in enumerate(ctx.places):
        A, B, shift = factors[3 * j : 3 * j + 3]
        columns = d[:, start:stop]
        dS = scale * columns @ B.to(d.dtype)
        dX = dX + dS @ A.to(d.dtype)
        dA, dB = None, None
        if read is not None:
            x = _rows(read)
            dA = (dS.t() @ x).to(A.dtype)
            dB = (scale * columns.t() @ (x @ A.t().to(x.dtype))).to(B.dtype)
        grads += [dA, dB, columns.sum(0, dtype=shift.dtype) if shift is not None else None]
    db = d.sum(0) if needed[3] else None
    dX = dX.reshape(*dY.shape[:-1], -1)
    return dX, dY if needed[1] else None, None, db, None, *grads


def _no_view(flat: Tensor, shape: torch.Size) -> Tensor:
    """Return `flat` in another shape as a tensor that the caller may change in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(flat, shape)
    return shaped


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _columns(x: Tensor, start: int, stop: int) -> Tensor:
    return x if stop - start == x.shape[1] else x[:, start:stop]


def _scaled(
    As: Sequence[Tensor], places: Sequence[tuple[float, int, int]], dtype: torch.dtype
) -> Tensor:
    """Return the s_j A_j (r_j, in) of all terms above each other, cast."""
    scaled = [
        torch.mul(A, place[0], out=torch.empty_like(A, dtype=dtype))
        for A, place in zip(As, places, strict=True)
    ]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _split(S: Tensor, As: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """Return the parts of S (tokens, Σ r_j) or dA (Σ r_j, in) that belong to each term."""
    if len(As) == 1:
        return (S,)
    parts: Sequence[Tensor] = torch.split(S, [len(A) for A in As], dim)
    return parts
