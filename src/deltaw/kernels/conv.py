"""A convolution and what adapters add to it, in one node of the autograd graph.

    y = base(x) + Σ s_j B_j S_j        S_j = (x ∘ mask) * K_j

K_j are the kernels of A; B_j mixes their channels at every position, group by group, and
accumulates into the base's output. Kept for the backward pass: the adapters' input, which is the
layer's own tensor unless dropout makes another, and the thin S.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.once import PLAIN_STEPS, once
from deltaw.kernels.shared import Input


class Setting(NamedTuple):
    """How a convolution with zero padding walks over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Term(NamedTuple):
    """What one adapter adds, in the dtype that is computed in.

    K (channels, in / groups, *kernel) with groups of its own; B (out, channels / mixed) mixes the
    channels in `mixed` groups.
    """

    K: Tensor
    B: Tensor
    scale: float
    groups: int
    mixed: int


def conv(
    base: Callable[[Tensor], Tensor],
    own: Input,
    W: Tensor,
    bias: Tensor | None,
    setting: Setting,
    terms: Sequence[Term],
) -> Tensor:
    """Return `base(x)`, which convolves with the frozen W and adds the bias, plus the terms.

    It can be differentiated once.
    """
    plan = tuple((term.scale, term.groups, term.mixed) for term in terms)
    factors = (tensor for term in terms for tensor in (term.K, term.B))
    output: Tensor = _Conv.apply(  # type: ignore[no-untyped-call]
        own.x, W, bias, own, base, setting, plan, *factors
    )
    return output


FIRST = 7
"""The place of the first K among the arguments; its B follows."""


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        own: Input,
        base: Callable[[Tensor], Tensor],
        setting: Setting,
        plan: tuple[tuple[float, int, int], ...],
        *factors: Tensor,
    ) -> Tensor:
        y = base(own.cast)
        y = y.contiguous()
        kept = []
        for (scale, groups, mixed), K, B in zip(plan, factors[0::2], factors[1::2], strict=True):
            stride, padding, dilation, _ = setting
            S = torch.convolution(
                own.read, K, None, stride, padding, dilation, False, [0] * len(stride), groups
            )
            _grouped(y, mixed).baddbmm_(_spread(B, mixed, len(y)), _grouped(S, mixed), alpha=scale)
            kept.append(S)
        ctx.setting, ctx.plan = setting, plan
        ctx.save_for_backward(own.read, own.mask, W, *kept, *factors)
        return y

    @staticmethod
    @once("An adapted convolution", PLAIN_STEPS)
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        read, mask, W, *saved = ctx.saved_tensors
        kept, factors = saved[: len(ctx.plan)], saved[len(ctx.plan) :]
        needed = ctx.needs_input_grad
        dY = dY.contiguous()
        dX = None
        grads: list[Tensor | None] = []
        for (scale, groups, mixed), S, K, B in zip(
            ctx.plan, kept, factors[0::2], factors[1::2], strict=True
        ):
            d = _grouped(dY, mixed)
            dB = torch.bmm(d, _grouped(S, mixed).mT).view(len(dY), B.numel()).sum(0)
            dS = torch.bmm(_spread(B, mixed, len(dY)).mT, d).view(S.shape).mul_(scale)
            wanted = (needed[0], needed[FIRST + len(grads)])
            own, dK = _backward(dS, read, K, ctx.setting._replace(groups=groups), wanted)
            if needed[0]:
                dX = own if dX is None else dX.add_(own)
            grads += [dK, dB.view(B.shape).mul_(scale)]
        if dX is not None:
            if mask is not None:
                dX.mul_(mask)
            dX.add_(_backward(dY, read, W.to(dY.dtype), ctx.setting, (True, False))[0])
        db = dY.flatten(2).sum((0, 2)) if needed[2] else None
        return dX, None, db, None, None, None, None, *grads


def _backward(
    dY: Tensor, x: Tensor, W: Tensor, setting: Setting, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = setting
    dX, dW, _ = torch.ops.aten.convolution_backward(
        dY,
        x,
        W,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [*wanted, False],
    )
    return dX, dW


def _grouped(y: Tensor, groups: int) -> Tensor:
    """Return (batch · groups, channels / groups, positions) of (batch, channels, *space)."""
    return y.view(len(y) * groups, y.shape[1] // groups, math.prod(y.shape[2:]))


def _spread(B: Tensor, groups: int, batch: int) -> Tensor:
    """Return B (out, r) as (batch · groups, out / groups, r)."""
    split = B.view(groups, -1, B.shape[1])
    return split.expand(batch, *split.shape).reshape(batch * groups, *split.shape[1:])
