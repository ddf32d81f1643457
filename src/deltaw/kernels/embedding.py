"""Looked-up rows and what adapters add to them, in one node of the autograd graph.

    y = base(ids) + Σ S_j B_jᵀ        S_j = s_j A_j[:, ids]ᵀ, zero for the padding token

The products accumulate into the looked-up rows. Kept for the backward pass: the ids and the thin S.
With dS_j = s_j dY B_j: dB_j = dYᵀ S_j, and the columns of dA_j gather the rows of dS_j.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels.once import PLAIN_STEPS, once


class Term(NamedTuple):
    """What one adapter adds: A (r, vocabulary) and B (width, r) in any dtype, and s."""

    A: Tensor
    B: Tensor
    scale: float | Tensor


def embedding(
    base: Callable[[Tensor], Tensor], ids: Tensor, padding: int | None, terms: Sequence[Term]
) -> Tensor:
    """Return `base(ids)`, the rows (..., width) of a frozen table, plus the terms.

    It can be differentiated once; `padding` is the id of the token that gets nothing.
    """
    scales = tuple(term.scale for term in terms)
    factors = (tensor for term in terms for tensor in (term.A, term.B))
    output: Tensor = _LookUp.apply(ids, base, padding, scales, *factors)  # type: ignore[no-untyped-call]
    return output


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        base: Callable[[Tensor], Tensor],
        padding: int | None,
        scales: tuple[float | Tensor, ...],
        *factors: Tensor,
    ) -> Tensor:
        y = base(ids)
        flat, dtype = y.view(-1, y.shape[-1]), y.dtype
        kept = []
        for A, B, scale in zip(factors[0::2], factors[1::2], scales, strict=True):
            S = F.embedding(ids.reshape(-1), A.t()).to(dtype) * scale
            if padding is not None:
                S.masked_fill_((ids.reshape(-1) == padding).unsqueeze(-1), 0)
            flat.addmm_(S, B.to(dtype).t())
            kept.append(S)
        ctx.padding, ctx.scales = padding, scales
        ctx.save_for_backward(ids, *kept, *factors)
        return y

    @staticmethod
    @once("An adapted embedding", PLAIN_STEPS)
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        ids, *saved = ctx.saved_tensors
        kept, factors = saved[: len(ctx.scales)], saved[len(ctx.scales) :]
        d = dY.reshape(-1, dY.shape[-1])
        grads: list[Tensor | None] = []
        for S, A, B, scale in zip(kept, factors[0::2], factors[1::2], ctx.scales, strict=True):
            dA = dB = None
            if ctx.needs_input_grad[4 + len(grads)]:
                dS = (d @ B.to(d.dtype)).to(A.dtype) * scale
                padding = -1 if ctx.padding is None else ctx.padding
                dA = torch.ops.aten.embedding_dense_backward(
                    dS, ids.reshape(-1), A.shape[1], padding, False
                ).t()
            if ctx.needs_input_grad[5 + len(grads)]:
                dB = (d.t() @ S).to(B.dtype)
            grads += [dA, dB]
        return None, None, None, None, *grads
