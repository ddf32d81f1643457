"""Gradients that can be taken once, and say so where they are differentiated again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Any, ...]]
PLAIN_STEPS = "differentiate the model by torch.func, for which it computes in plain steps."


def once(what: str, fix: str) -> Callable[[Backward], Backward]:
    """Return what turns steps in place into the `backward` of a function of autograd's."""
    message = f"{what} cannot be differentiated twice.\nFix: {fix}"

    def decorated(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def first(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                found = backward(ctx, *upstream)
            if not torch.is_grad_enabled():
                return found
            leaves = (None if g is None else g.detach().requires_grad_() for g in found)
            refused: tuple[Any, ...] = _Last.apply(message, *leaves)  # type: ignore[no-untyped-call]
            return refused

        return first

    return decorated


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(ctx.message)
