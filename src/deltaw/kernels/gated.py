"""The product of a gated MLP that keeps what goes into it alone.

    h = φ(g) ∘ u        du = φ(g) ∘ dh        dg = φ'(g) ∘ (u ∘ dh)

In plain steps autograd keeps φ(g) too, and whoever reads h keeps h. Both are made again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.once import once
from deltaw.kernels.recipe import leave

Activation = Callable[[Tensor], Tensor]


def gated(g: Tensor, u: Tensor, phi: Activation, again: bool = True) -> Tensor:
    """Return φ(g) ∘ u for g and u of one shape.

    With `again` it says how to make it once more, where g and u are kept anyway.
    """
    made = _Made(phi)
    h: Tensor = _Gated.apply(g, u, made)  # type: ignore[no-untyped-call]
    kept = again and (g.requires_grad or u.requires_grad)
    return leave(h, made.product, g.detach(), u.detach()) if kept else h


class _Made:
    """φ(g), between the reader of h that makes it again and the backward pass of h."""

    def __init__(self, phi: Activation) -> None:
        self.phi = phi
        self._kept: tuple[int, Tensor] | None = None

    def product(self, g: Tensor, u: Tensor) -> Tensor:
        """Return φ(g) ∘ u."""
        self._kept = torch._C._current_graph_task_id(), self.phi(g)
        return self._kept[1] * u

    def taken(self, g: Tensor) -> Tensor:
        """Return φ(g), which is no longer kept."""
        kept, self._kept = self._kept, None
        same = kept is not None and kept[0] == torch._C._current_graph_task_id()
        return kept[1] if kept is not None and same else self.phi(g)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, made: _Made) -> Tensor:
        ctx.made = made
        ctx.save_for_backward(g, u)
        return made.phi(g) * u

    @staticmethod
    @once("A gated block that computes in place", "leave deltaw.fuse_blocks out.")
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        if is_silu(ctx.made.phi):
            dg = torch.ops.aten.silu_backward(dh * u, g)
            return dg, ctx.made.taken(g).mul_(dh), None
        with torch.enable_grad():
            leaf = g.detach().requires_grad_()
            a = ctx.made.phi(leaf)
        return torch.autograd.grad(a, leaf, dh * u)[0], a.detach() * dh, None


def is_silu(phi: Activation) -> bool:
    """Tell whether φ is the one whose derivative torch has a kernel for."""
    return isinstance(phi, nn.SiLU) or type(phi).__name__ == "SiLUActivation"
