"""A table of embeddings with the rows of some tokens replaced, as layers read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.adapter import TokenRows
from deltaw.parts import weighted
from deltaw.readable import Readable


class RowsReplaced(Readable):
    """W + Σ weight (rows - W[ids]) for W (vocabulary, width), of which no second table is made.

    Looking tokens up takes the rows where they are asked for, and the output head adds
    x (rows - W[ids])ᵀ to the logits of these tokens, so that gradients are those of the rows alone.
    """

    def __init__(self, W: Tensor, replaced: Sequence[tuple[TokenRows, float | Tensor]]) -> None:
        super().__init__(W)
        self.replaced = replaced

    def parts(self) -> list[Tensor]:
        """Return the rows."""
        return [rows.values for rows, _ in self.replaced]

    def dense(self) -> Tensor:
        """Return the whole table."""
        if self._alone():
            ((ids, values), _), *_ = self.replaced
            return self.W.index_copy(0, ids, values.to(self.W.dtype))
        wide = torch.promote_types(torch.float32, self.W.dtype)
        total = self.W.to(wide)
        for rows, weight in self.replaced:
            total = total.index_add(0, rows.ids, weighted(self._change(rows).to(wide), weight))
        return total.to(self.W.dtype)

    def _alone(self) -> bool:
        """Tell whether the rows simply take the place of the old ones."""
        weights = [weight for _, weight in self.replaced]
        return len(weights) == 1 and isinstance(weights[0], float) and weights[0] == 1

    def _change(self, rows: TokenRows) -> Tensor:
        """Return rows - W[ids], in the dtype of the rows."""
        return rows.values - self.W[rows.ids].to(rows.values.dtype)

    def _looked_up(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y`, what W has for the tokens x (...), with the rows in it."""
        for rows, weight in self.replaced:
            hit = x.unsqueeze(-1) == rows.ids
            known, place = hit.any(-1, keepdim=True), hit.int().argmax(-1)
            if self._alone():
                return torch.where(known, F.embedding(place, rows.values).to(y.dtype), y)
            change = F.embedding(place, weighted(self._change(rows), weight))
            y = y + torch.where(known, change, 0).to(y.dtype)
        return y

    def _as_head(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logits `y` (..., vocabulary) of W with those of the rows changed."""
        for rows, weight in self.replaced:
            change = weighted(self._change(rows), weight).to(x.dtype)
            y = y.index_add(-1, rows.ids, F.linear(x, change).to(y.dtype))
        return y

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        x, w = (args[0], args[1]) if len(args) > 1 else (None, None)
        if isinstance(x, Tensor) and isinstance(w, cls) and func.__name__ == "embedding":
            return w._looked_up(x, func(x, w.W, *args[2:], **kwargs))
        if isinstance(x, Tensor) and isinstance(w, cls) and func.__name__ == "linear":
            return w._as_head(x, func(x, w.W, *args[2:], **kwargs))
        return super().__torch_function__(func, types, args, kwargs)
