"""Adapters on n equal groups of rows that lie together, in batched products.

With A (n, r, in), B (n, out, r), and x and y seen as n groups:

    y_k = base(x)_k + S_k B_kᵀ        S_k = x_k (s_k A_k)ᵀ

Every product of `linear.py` becomes one batched product, so that four adapters cost little more
than one; ranks are padded with zeros, whose gradients are dropped.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.rows import Grads, Needs, Terms, Way


class Batched(Way):
    """Two batched products for all adapters; term k is for group k."""

    def add(self, y: Tensor, x: Tensor, terms: Terms) -> list[Tensor | None]:
        """Add all terms to `y` in place and return S (n, rows, r)."""
        A, B = _stacked(terms, x.dtype)
        S = torch.bmm(_grouped(x, len(terms)), A.mT)
        groups = y.view(len(terms), -1, y.shape[-1])
        groups.baddbmm_(S, B.mT)
        for group, term in zip(groups, terms, strict=True):
            if term is not None and term.shift is not None:
                group.add_(term.shift)
        return [S]

    def back(
        self, dY: Tensor, x: Tensor, kept: Sequence[Any], terms: Terms, needs: Needs, need_x: bool
    ) -> tuple[Grads, Tensor | None]:
        """Return the gradients of all terms, and of the input."""
        A, B = _stacked(terms, dY.dtype)
        d = _grouped(dY, len(terms))
        dS = torch.bmm(d, B)
        dA = torch.bmm(dS.mT, _grouped(x, len(terms)))
        dBt = torch.bmm(kept[0].mT, d)
        grads: Grads = []
        for k, (term, need) in enumerate(zip(terms, needs, strict=True)):
            if term is None:
                grads += (None, None, None)
                continue
            r, shift = len(term.A), term.shift
            grads += (
                torch.mul(dA[k, :r], term.scale, out=torch.empty_like(term.A)) if need[0] else None,
                torch.empty_like(term.B).copy_(dBt[k, :r].t()) if need[1] else None,
                d[k].sum(0, dtype=shift.dtype) if shift is not None and need[2] else None,
            )
        return grads, torch.bmm(dS, A).view(-1, x.shape[-1]) if need_x else None


def _grouped(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, -1, x.shape[-1])


def _stacked(terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (n, r, in), scaled, and B (n, out, r) of all terms, zeros beyond lower ranks."""
    ranks = [0 if term is None else len(term.A) for term in terms]
    rank = max(ranks)
    like = next(term for term in terms if term is not None)
    make = torch.empty if min(ranks) == rank else torch.zeros
    A = make((len(terms), rank, like.A.shape[1]), dtype=dtype, device=like.A.device)
    B = make((len(terms), len(like.B), rank), dtype=dtype, device=like.B.device)
    for k, (r, term) in enumerate(zip(ranks, terms, strict=True)):
        if term is not None:
            torch.mul(term.A, term.scale, out=A[k, :r])
            B[k, :, :r].copy_(term.B)
    return A, B
