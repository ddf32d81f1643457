"""`nn.Linear`, whole or as equal slices of a fused output: y = W x."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.geometry import WEIGHT
from deltaw.kernels import compute_dtype
from deltaw.kernels.bank import Bank, add_batched, add_masked, bank_dtype, stacked
from deltaw.kernels.batched import Batched
from deltaw.kernels.frozen import linear_in
from deltaw.kernels.linear import Term, add_in_place, add_low_rank, linear, rescale
from deltaw.kernels.rows import add_rows
from deltaw.kernels.segments import Segments
from deltaw.layer import AdaptedLayer
from deltaw.parts import Part, factors, gains_of, joinable, sole_gain, total_scale
from deltaw.rowmap import Division, Seen
from deltaw.state import LayerState
from deltaw.swap import origin_of

if TYPE_CHECKING:
    _Linear = nn.Linear
else:
    _Linear = object

_SLICE = re.compile(r"slice_(\d+)_of_(\d+)")


def slice_slot(index: int, count: int) -> str:
    """Return the name of the slot that is slice `index` of `count` equal parts of the output."""
    return f"slice_{index}_of_{count}"


class Linear(AdaptedLayer, _Linear):
    """x (..., in) to y (..., out) with W (out, in)."""

    kind = "linear"
    takes = "nn.Linear"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take `nn.Linear` and its subclasses."""
        return isinstance(layer, nn.Linear)

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer runs the forward of `nn.Linear`."""
        return origin_of(layer).forward is nn.Linear.forward

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original forward, with the gradient of its input if the storage has none."""
        storage = self.storage
        if storage is None or not torch.is_grad_enabled() or storage.differentiable(self):
            return super().base(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        return linear_in(x, self.bias, super().base, self.whole)

    def slots(self, enabled: Sequence[bool]) -> tuple[str, ...]:
        """Return the marked slices of a fused output, or the whole weight."""
        count = len(enabled)
        return tuple(slice_slot(i, count) for i, on in enumerate(enabled) if on) or (WEIGHT,)

    def whole(self) -> Tensor:
        """Return W (out, in) of the whole layer."""
        return self.dense()

    def extent(self) -> tuple[int, int]:
        """Return (out, in) of the whole layer."""
        rows, columns = self.dense_shape()
        return rows, columns

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in) of the slot."""
        rows, columns = self.extent()
        start, stop = span(slot, rows)
        return stop - start, columns

    def matrix(self, slot: str) -> Tensor:
        """Return the rows of W that the slot takes."""
        W = self.whole()
        return W[slice(*span(slot, W.shape[0]))]

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return the rows of M among rows of zeros."""
        rows, _ = self.extent()
        start, stop = span(slot, rows)
        return M if stop - start == rows else F.pad(M, (0, 0, start, rows - stop))

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """Return B among rows of zeros, and A."""
        return _at(B, slot, self.extent()[0]), A

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Return M x."""
        return F.linear(x, M.to(x.dtype))

    def product(self, x: Tensor, base: Tensor, slot: str) -> Tensor:
        """Return what the slot has of the base's output, less its bias."""
        y = base if self.bias is None else base - self.bias.to(base.dtype)
        return y[..., slice(*span(slot, y.shape[-1]))]

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Return B (scale A x)."""
        return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))

    def fused(self, x: Tensor, parts: Sequence[Part]) -> Tensor | None:
        """Return base and parts: one node of the graph, or without gradients added in place."""
        joins = self.joins()
        if not (joins or self.storage or self.plain(self)) or not x.is_floating_point():
            return None
        gain = sole_gain(x, parts)
        if gain is None and not joinable(x, parts):
            return None
        dtype = compute_dtype(x)
        if torch.is_grad_enabled():
            return self._in_graph(x, parts, joins, dtype, gain)
        y = self.base(x)
        if parts[0].p or y.dtype != dtype or not (joins or y.is_contiguous()):
            return self.added(x, y, parts)
        read = x if x.dtype == dtype else x.to(dtype)
        y = y if joins else y.clone()
        for part in parts:
            slot, update, weight, _ = part
            own = y if slot == WEIGHT else y[..., slice(*span(slot, y.shape[-1]))]
            add_in_place(own, read, *factors(part), total_scale(part))
            if gain is not None:
                rescale(own, gain, self.bias)
            if update.shift is not None:
                own.add_(update.shift, alpha=cast(float, weight))
        return y

    def _in_graph(
        self,
        x: Tensor,
        parts: Sequence[Part],
        joins: bool,
        dtype: torch.dtype,
        gain: Tensor | None,
    ) -> Tensor:
        """Return base and parts from a kernel, which a frozen dense weight takes part in.

        Any other base runs on its own before.
        """
        own = self.reading(x, parts[0].p, dtype)
        if joins:
            W = self.whole()
            return linear(self.base, own, W, self.bias, _term(parts, W.shape[0]), gain)
        y = self.base(x)
        if y.is_contiguous() and y.dtype == dtype:
            bias = None if gain is None else self.bias
            return add_low_rank(y, own, _term(parts, y.shape[-1]), bias, gain)
        return self.added(x, y, parts)

    def fused_rows(self, x: Tensor, seen: Seen, division: Division) -> Tensor | None:
        """Return the base's output with each row under its own adapter, from a kernel."""
        if not (self.storage or self.plain(self)) or not x.is_floating_point():
            return None
        dtype = compute_dtype(x)
        read = x if x.dtype == dtype else x.to(dtype)
        n = len(division.distinct)
        key = bank_dtype(read, n, division.together), self.training
        needs_x = torch.is_grad_enabled() and x.requires_grad
        bank = seen.banks.get(key)
        if bank is not None and not needs_x and not bank.trained():
            return self._banked(x, read, bank, division)
        found = [self.contributions([(name, 1.0)]) for name in division.distinct]
        parts = [part for own in found for part in own]
        gains = gains_of(x, found)
        if gains is None:
            return None
        own = self.reading(x, parts[0].p, dtype)
        held = [self.parts(name).values() for name in division.distinct]
        tensors = [p for own_parts in held for adapter in own_parts for p in adapter.parameters()]
        trained = any(tensor.requires_grad for tensor in tensors)
        graded = needs_x or (torch.is_grad_enabled() and trained)
        joins = self.joins()
        W, bias, y = (self.whole(), self.bias, None) if joins else (None, None, self.base(x))
        if y is not None and not (y.is_contiguous() and y.dtype == dtype):
            return None
        width = W.shape[0] if W is not None else y.shape[-1]  # type: ignore[union-attr]
        terms = [_term(own_parts, width) if own_parts else None for own_parts in found]
        if graded or not seen.passed or trained or parts[0].p:
            seen.passed = seen.passed or not graded
            if any(gain is not None for gain in gains):
                return None
            apart = [run.rows for run in division.runs]
            way = Batched() if division.together else Segments(apart)
            return add_rows(self.base, own, W, bias, y, terms, way)
        seen.banks[key] = stacked(terms, key[0], tensors, gains, self.bias)
        return self._banked(x, read, seen.banks[key], division)

    def _banked(self, x: Tensor, read: Tensor, bank: Bank, division: Division) -> Tensor | None:
        y = self.base(x)
        if not (y.is_contiguous() and y.dtype == read.dtype):
            return None
        y = y if self.joins() else y.clone()
        if division.together:
            add_batched(y, read, bank)
        else:
            add_masked(y, read, bank, division.index)
        return y

    def spread(self, v: Tensor, slot: str) -> Tensor:
        """Return zeros with v where the slot lies."""
        rows, _ = self.extent()
        start, stop = span(slot, rows)
        return F.pad(v, (start, rows - stop))

    def place(self, y: Tensor, delta: Tensor, slot: str) -> Tensor:
        """Add `delta` to the part of y that the slot takes."""
        start, stop = span(slot, y.shape[-1])
        if stop - start == y.shape[-1]:
            return y + delta.to(y.dtype)
        before, part, after = y.tensor_split((start, stop), dim=-1)
        return torch.cat((before, part + delta.to(y.dtype), after), dim=-1)


def _term(parts: Sequence[Part], rows: int) -> Term:
    """Return what the kernel adds to an output of that many rows.

    Several parts are one of the sum of their ranks, with zeros in B beside the rows of a slice.
    """
    if len(parts) == 1 and parts[0].slot == WEIGHT and parts[0].weight == 1:
        return Term(*factors(parts[0]), total_scale(parts[0]), parts[0].update.shift)
    A = torch.cat([factors(part)[0] * total_scale(part) for part in parts])
    B = torch.cat([_at(factors(part)[1], part.slot, rows) for part in parts], 1)
    shifts = [
        _at(part.update.shift * part.weight, part.slot, rows)
        for part in parts
        if part.update.shift is not None
    ]
    return Term(A, B, 1.0, torch.stack(shifts).sum(0) if shifts else None)


def _at(tensor: Tensor, slot: str, rows: int) -> Tensor:
    """Return zeros of that many rows with `tensor` where the slot lies."""
    start, stop = span(slot, rows)
    if stop - start == rows:
        return tensor
    return F.pad(tensor, (*[0, 0] * (tensor.dim() - 1), start, rows - stop))


def span(slot: str, rows: int) -> tuple[int, int]:
    """Return the first and the one-past-last row of a slot among `rows` rows."""
    if slot == WEIGHT:
        return 0, rows
    match = _SLICE.fullmatch(slot)
    assert match is not None, slot
    index, count = int(match[1]), int(match[2])
    size = rows // count
    return index * size, (index + 1) * size
