"""A parameter with what adapters add to it, as the products that read it see it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.parts import weighted
from deltaw.readable import Readable

_PRODUCTS = ("matmul", "mm", "bmm")
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_ALIGNED = 8
"""A grouped product takes widths of whole 16 bytes, which are 8 numbers in half precision."""


class Thin(NamedTuple):
    """ΔW = weight scale L R by L (..., rows, r) and R (..., r, columns)."""

    L: Tensor
    R: Tensor
    scale: float | Tensor
    weight: float | Tensor

    def of(self, change: Callable[[Tensor], Tensor]) -> "Thin":
        """Return the same with both factors changed."""
        return self._replace(L=change(self.L), R=change(self.R))


class AdaptedWeight(Readable):
    """W + Σ ΔW for W (..., rows, columns), whose products add thin ones and form no ΔW.

    A module that reads its own parameter gets this in its place. Linear layers, matrix products and
    grouped products of it or of some of its matrices take the factors; whatever else is done with
    it gets the dense sum.
    """

    def __init__(self, W: Tensor, thin: Sequence[Thin]) -> None:
        super().__init__(W)
        self.thin = thin
        self._each: list[AdaptedWeight] | None = None

    def parts(self) -> list[Tensor]:
        """Return the factors."""
        return [factor for t in self.thin for factor in (t.L, t.R)]

    @property
    def mT(self) -> "AdaptedWeight":
        """Return the transpose of each matrix."""
        thin = [t._replace(L=t.R.mT, R=t.L.mT) for t in self.thin]
        return AdaptedWeight(self.W.mT, thin)

    def transpose(self, first: int, second: int) -> "AdaptedWeight | Tensor":
        """Return this with two dimensions exchanged."""
        dims = self.W.dim()
        if {first % dims, second % dims} == {dims - 1, dims - 2}:
            return self.mT
        return self.dense().transpose(first, second)

    def dense(self) -> Tensor:
        """Return W + Σ ΔW, summed in float32 or wider and rounded once."""
        wide = torch.promote_types(torch.float32, self.W.dtype)
        total = self.W.to(wide)
        for L, R, scale, weight in self.thin:
            total = total + weighted((scale * L.to(wide)) @ R.to(wide), weight)
        return total.to(self.W.dtype)

    def __getitem__(self, key: Any) -> "AdaptedWeight | Tensor":
        """Return the matrices that `key` takes of a stack; of anything else the dense sum's."""
        listed = isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32)
        if self.W.dim() < 3 or not (isinstance(key, (int, slice)) or listed):
            return self.dense()[key]
        several = isinstance(key, slice) or (listed and key.dim())
        if several or torch.compiler.is_compiling():
            return AdaptedWeight(self.W[key], [t.of(lambda factor: factor[key]) for t in self.thin])
        if self._each is None:
            self._each = self._taken_apart()
        return self._each[int(key)]

    def _taken_apart(self) -> "list[AdaptedWeight]":
        """Return every matrix, in one step, whose gradient is one stack.

        Taken one by one, the gradient of each would be as large as the whole.
        """
        each = [
            [t._replace(L=L, R=R) for L, R in zip(t.L.unbind(), t.R.unbind(), strict=True)]
            for t in self.thin
        ]
        return [AdaptedWeight(W, [terms[i] for terms in each]) for i, W in enumerate(self.W)]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        x, w = (args[0], args[1]) if len(args) > 1 else (None, None)
        if isinstance(x, Tensor) and isinstance(w, cls):
            if name == "linear":
                y = func(x, w.W, *args[2:], **kwargs)
                return w._added(y, x, lambda x, t: F.linear(F.linear(x, t.R) * t.scale, t.L))
            if name in _PRODUCTS and not kwargs:
                y = func(x, w.W)
                return w._added(y, x, lambda x, t: func(func(x, t.L) * t.scale, t.R))
            given = {key: value for key, value in kwargs.items() if value is not None}
            if name in _GROUPED and given.keys() == {"offs"}:
                y = func(x, w.W, **given)
                return w._added(y, x, lambda x, t: _grouped(func, x, t, given["offs"]))
        if isinstance(x, cls) and isinstance(w, Tensor) and name in _PRODUCTS and not kwargs:
            y = func(x.W, w)
            return x._added(y, w, lambda x, t: func(t.L, func(t.R, x) * t.scale))
        return super().__torch_function__(func, types, args, kwargs)

    def _added(self, y: Tensor, x: Tensor, low: Callable[[Tensor, Thin], Tensor]) -> Tensor:
        """Return y and the thin products with x, in the dtype of x."""
        for term in self.thin:
            delta = low(x, term.of(lambda factor: factor.to(x.dtype)))
            y = y + weighted(delta, term.weight).to(y.dtype)
        return y


def _grouped(func: Any, x: Tensor, term: Thin, offs: Tensor) -> Tensor:
    """Return the grouped products, with a rank that they take."""
    missing = -term.R.shape[-2] % _ALIGNED
    L, R = F.pad(term.L, (0, missing)), F.pad(term.R, (0, 0, 0, missing))
    delta: Tensor = func(func(x, L, offs=offs) * term.scale, R, offs=offs)
    return delta
