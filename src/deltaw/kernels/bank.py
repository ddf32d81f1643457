"""Factors of several frozen adapters stacked, and added to the rows that are under them.

- batched: with A (n, r, in) and B (n, r, out), two batched products over n equal groups of rows;
- masked: S = x [A_1; ...; A_n]ᵀ for all rows, zero where an adapter is another row's, then
  S [B_1; ...; B_n].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import factor_dtype
from deltaw.kernels.linear import Term


class Bank(NamedTuple):
    """Factors of n adapters stacked, in the dtype that is computed in; ranks are padded with zeros.

    A (n, r, in) with its scale, B (n, r, out), and where any adapter has them `shift` (n, 1, out)
    and `excess` (n, 1, out), what a gain has over 1.
    """

    A: Tensor
    B: Tensor
    shift: Tensor | None
    of: Sequence[Tensor] = ()
    excess: Tensor | None = None

    def trained(self) -> bool:
        """Tell whether any of the factors is trained now, so that these may be stale."""
        return any(factor.requires_grad for factor in self.of)


def stacked(
    terms: Sequence[Term | None],
    dtype: torch.dtype,
    of: Sequence[Tensor] = (),
    gains: Sequence[Tensor | None] = (),
    bias: Tensor | None = None,
) -> Bank:
    """Return A, B, scale and shift of all terms in one bank; None adds nothing.

    `gains` multiply the outputs less the base's bias, which is therefore taken off the shifts.
    """
    known = [term for term in terms if term is not None]
    rank = max(len(term.A) for term in known)
    bank = Bank(
        known[0].A.new_zeros((len(terms), rank, known[0].A.shape[1]), dtype=dtype),
        known[0].B.new_zeros((len(terms), rank, len(known[0].B)), dtype=dtype),
        known[0].B.new_zeros((len(terms), 1, len(known[0].B)), dtype=dtype)
        if any(term.shift is not None for term in known)
        else None,
        of,
    )
    for place, term in enumerate(terms):
        if term is not None:
            r = len(term.A)
            torch.mul(term.A, term.scale, out=bank.A[place, :r])
            bank.B[place, :r].copy_(term.B.t())
            if term.shift is not None and bank.shift is not None:
                bank.shift[place, 0].copy_(term.shift)
    if any(gain is not None for gain in gains):
        none = torch.zeros((), device=bank.B.device)
        excess = [none if gain is None else gain - 1 for gain in gains]
        wide = torch.stack([vector.expand(bank.B.shape[2]) for vector in excess]).unsqueeze(1)
        bank = bank._replace(excess=wide.to(dtype))
        if bias is not None:
            shift = -wide * bias if bank.shift is None else bank.shift - wide * bias
            bank = bank._replace(shift=shift.to(dtype))
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
    if bank.excess is not None:
        groups.addcmul_(groups, bank.excess.to(y.dtype))
    if bank.shift is not None:
        groups.add_(bank.shift)


def add_masked(y: Tensor, x: Tensor, bank: Bank, index: Tensor) -> None:
    """Add to `y` in place; `index` (rows,) is the adapter of each row, n for none."""
    n, rank, width = bank.A.shape
    dtype = bank.A.dtype
    others = F.one_hot(index, n + 1)[:, None, :n, None] == 0
    S = x.reshape(-1, width).to(dtype) @ bank.A.flatten(0, 1).t()
    S.view(len(index), len(S) // len(index), n, rank).masked_fill_(others, 0)
    flat, B = y.view(-1, y.shape[-1]), bank.B.flatten(0, 1)
    if dtype == y.dtype:
        flat.addmm_(S, B)
    else:
        flat.add_(S @ B)
    rows = y.view(len(index), -1, y.shape[-1])
    if bank.excess is not None:
        rows.addcmul_(rows, _of_rows(bank.excess, index).to(y.dtype))
    if bank.shift is not None:
        rows.add_(_of_rows(bank.shift, index))


def _of_rows(vectors: Tensor, index: Tensor) -> Tensor:
    """Return the vectors (n, 1, out) of each row's adapter, zeros for none."""
    return F.pad(vectors, (0, 0, 0, 0, 0, 1))[index]
