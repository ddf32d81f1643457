"""What stands in for a parameter or buffer of which adapters hold trained copies."""

import torch
from torch import Tensor

from deltaw.adapter import TokenRows
from deltaw.parts import weighted
from deltaw.readable import Readable
from deltaw.tokens import RowsReplaced

Copies = list[tuple[Tensor | TokenRows, float | Tensor]]


def mixed(frozen: Tensor, copies: Copies) -> Tensor | Readable:
    """Return `P + Σ weight (copy - P)`, of only one copy under weight 1 the copy itself.

    Copies of some rows of P are put in their places where it is read.
    """
    whole = [(copy, weight) for copy, weight in copies if isinstance(copy, Tensor)]
    rows = [(copy, weight) for copy, weight in copies if isinstance(copy, TokenRows)]
    total = _mixed_whole(frozen, whole)
    if not rows:
        return total
    if not whole:
        return RowsReplaced(frozen, rows)
    return total + RowsReplaced(frozen, rows).dense() - frozen


def _mixed_whole(frozen: Tensor, copies: list[tuple[Tensor, float | Tensor]]) -> Tensor:
    if not copies:
        return frozen
    first, weight = copies[0]
    if len(copies) == 1 and isinstance(weight, float) and weight == 1:
        return first
    rest = 1 - sum(weight for _, weight in copies)
    wide = frozen.to(torch.promote_types(frozen.dtype, first.dtype))
    return sum((weighted(copy, weight) for copy, weight in copies), rest * wide)
