"""Adapters one after another, each on its own rows, wherever these lie.

y_i = base(x)_i + s_k B_k A_k x_i        for the rows i of adapter k
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deltaw.kernels.linear import Term
from deltaw.kernels.rows import Grads, Needs, Terms, Way

Rows = slice | Tensor


class Segments(Way):
    """Two products per adapter; `rows` are those of each term, as a slice or by index."""

    def __init__(self, rows: Sequence[Rows]) -> None:
        self.rows = rows

    def add(self, y: Tensor, x: Tensor, terms: Terms) -> list[Tensor | None]:
        """Add all terms to `y` in place and return S of each."""
        pairs = zip(self.rows, terms, strict=True)
        return [None if term is None else _add(y, x, rows, term) for rows, term in pairs]

    def back(
        self, dY: Tensor, x: Tensor, kept: Sequence[Any], terms: Terms, needs: Needs, need_x: bool
    ) -> tuple[Grads, Tensor | None]:
        """Return the gradients, term after term."""
        dtype = dY.dtype
        dX = dY.new_zeros(x.shape) if need_x else None
        grads: Grads = []
        for rows, term, S, need in zip(self.rows, terms, kept, needs, strict=True):
            if term is None:
                grads += (None, None, None)
                continue
            A, B, scale, shift = term
            d = dY[rows].reshape(-1, dY.shape[-1])
            dS = (d @ B.to(dtype)).mul_(scale)
            need_A, need_B, need_shift = need
            own = x[rows].reshape(-1, x.shape[-1])
            grads += (
                (dS.t() @ own).to(A.dtype) if need_A else None,
                (d.t() @ S).to(B.dtype).mul_(scale) if need_B else None,
                d.sum(0, dtype=shift.dtype) if shift is not None and need_shift else None,
            )
            if dX is not None:
                _into(dX, rows, dS @ A.to(dtype))
        return grads, None if dX is None else dX.view(-1, x.shape[-1])


def _add(y: Tensor, x: Tensor, rows: Rows, term: Term) -> Tensor:
    """Add a term to its rows of `y` in place and return S."""
    S = x[rows].reshape(-1, x.shape[-1]) @ term.A.to(x.dtype).t()
    Bt = term.B.to(x.dtype).t()
    if isinstance(rows, slice):
        own = y[rows].view(-1, y.shape[-1])
        own.addmm_(S, Bt, alpha=term.scale)
        if term.shift is not None:
            own.add_(term.shift)
    else:
        part = (S @ Bt).mul_(term.scale)
        _into(y, rows, part if term.shift is None else part.add_(term.shift))
    return S


def _into(y: Tensor, rows: Rows, part: Tensor) -> None:
    """Add the flattened part of some rows to them in place."""
    if isinstance(rows, slice):
        own = y[rows]
        own.add_(part.view(own.shape))
    else:
        y.index_add_(0, rows, part.view(len(rows), *y.shape[1:]))
