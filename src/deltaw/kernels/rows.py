"""Rows of one batch under adapters of their own, beside one product with the frozen weight.

Three ways, each equal to doing the rows of every adapter alone:

- segments, in `segments.py`: two products per adapter on its rows, wherever they lie;
- batched, in `batched.py`: two batched products over n equal groups of rows that lie together;
- masked, in `bank.py`: two products whatever n is, with n times the multiplications; without
  gradients, of factors that were stacked before.

The first two are one node of the autograd graph, which this file makes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.linear import Term, owned
from deltaw.kernels.once import PLAIN_STEPS, once
from deltaw.kernels.shared import Input

Terms = Sequence[Term | None]
Needs = Sequence[tuple[bool, bool, bool]]
Grads = list[Tensor | None]


class Way(ABC):
    """How every term is added to its own rows, and what that gives backwards."""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, terms: Terms) -> list[Tensor | None]:
        """Add all terms to `y` (rows, ..., out) in place and return what the gradients need."""

    @abstractmethod
    def back(
        self, dY: Tensor, x: Tensor, kept: Sequence[Any], terms: Terms, needs: Needs, need_x: bool
    ) -> tuple[Grads, Tensor | None]:
        """Return dA, dB and dshift of each term as needed, and dX (tokens, in) of all terms."""


def add_rows(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    terms: Terms,
    way: Way,
) -> Tensor:
    """Return the base's output plus the terms, with gradients; a term that is None adds nothing.

    W (out, in) is the frozen weight that `base` multiplies by, and adds `bias` to; without it `y`
    is the output of a base that knows its own gradients. It can be differentiated once.
    """
    scales = tuple(0.0 if term is None else term.scale for term in terms)
    factors: Grads = []
    for term in terms:
        factors += (None, None, None) if term is None else (term.A, term.B, term.shift)
    output: Tensor = _Rows.apply(own.x, y, W, bias, own, base, way, scales, *factors)  # type: ignore[no-untyped-call]
    return output


FIRST = 8
"""The place of the first A among the arguments; its B and its shift follow."""


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        own: Input,
        base: Callable[[Tensor], Tensor],
        way: Way,
        scales: tuple[float, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        output = base(own.cast) if y is None else y.clone()
        kept = way.add(output, own.read, _terms(scales, factors))
        ctx.way, ctx.scales = way, scales
        ctx.save_for_backward(own.read, own.mask, W, *factors, *kept)
        return owned(output)

    @staticmethod
    @once("A layer whose rows have adapters of their own", PLAIN_STEPS)
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        count = 3 * len(ctx.scales)
        read, mask, W, *saved = ctx.saved_tensors
        need_x, need_y, _, need_bias, *others = ctx.needs_input_grad
        needs = _triples(others[FIRST - 4 :])
        terms = _terms(ctx.scales, saved[:count])
        grads, dX = ctx.way.back(dY, read, saved[count:], terms, needs, need_x)
        flat = dY.reshape(-1, dY.shape[-1])
        if dX is not None:
            if mask is not None:
                dX.mul_(mask.view(dX.shape))
            if W is not None:
                dX.addmm_(flat, W.to(dY.dtype))
            dX = dX.view(read.shape)
        db = flat.sum(0) if need_bias else None
        return dX, dY if need_y else None, None, db, None, None, None, None, *grads


def _terms(scales: Sequence[float], factors: Sequence[Tensor | None]) -> list[Term | None]:
    return [
        None if A is None or B is None else Term(A, B, scale, shift)
        for scale, (A, B, shift) in zip(scales, _triples(factors), strict=True)
    ]


def _triples(flat: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
