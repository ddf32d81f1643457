"""What layers that read the same input (q, k and v; gate and up) do once for all of them.

Forward: the input's cast under autocast, and its dropout. Backward: the sum of what the readers
return for it. Autograd would add (tokens x in) tensors, one per reader; here each reader leaves its
thin dS = s dY B and its dY, and one node accumulates all products into one tensor,

    dX = ((Σ dS_j A_j) ∘ mask) + Σ dY_j W_j        Σ dS_j A_j = [dS_1 dS_2 ...] [A_1; A_2; ...]

Sharing never crosses the border of a checkpointed region, so that a recomputation draws the masks
that the forward pass drew; and a layer that comes a second time with the same tensor is another
pass, with masks of its own.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.dropout import keep_mask, rounded
from deltaw.kernels.recipe import Recipe, recipe_of


class Left(NamedTuple):
    """What the backward pass of one reader leaves: two products for dX, the first under a mask."""

    dS: Tensor
    A: Tensor
    mask: Tensor | None
    dY: Tensor
    W: Tensor | None


class Pool:
    """What the readers of one input left in the backward pass that runs now."""

    def __init__(self) -> None:
        self._task = -1
        self._left: list[Left] = []
        self._made: tuple[int, Tensor] | None = None

    def leave(self, left: Left) -> None:
        """Take the part of one reader; parts of a pass that was broken off are forgotten."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._left = task, []
        self._left.append(left)

    def made(self, recipe: Recipe) -> Tensor:
        """Return the tensor of a recipe, made once for all readers in a backward pass."""
        task = torch._C._current_graph_task_id()
        if self._made is None or self._made[0] != task:
            self._made = task, recipe.make(*recipe.of)
        return self._made[1]

    def take(self) -> Tensor | None:
        """Return dX (tokens, in) of all parts, which are no longer needed, or None without any."""
        left, self._left, self._made = self._left, [], None
        total = None
        while left:
            mask = left[0].mask
            alike = [part for part in left if _same(part.mask, mask)]
            left = [part for part in left if not _same(part.mask, mask)]
            own = _product(alike)
            if mask is not None:
                own.mul_(mask.view(own.shape))
            for part in alike:
                if part.W is not None:
                    own.addmm_(part.dY, part.W)
            total = own if total is None else total.add_(own)
        return total


class Input(NamedTuple):
    """An input: what gradients flow to, what base and adapters read, and the mask between them.

    `recipe` makes `cast` again; gradients of `x` are left in `pool`.
    """

    x: Tensor
    cast: Tensor
    read: Tensor
    mask: Tensor | None
    recipe: Recipe | None = None
    pool: Pool | None = None


class SharedInput:
    """One input and what was made of it."""

    def __init__(self, x: Tensor, reader: int) -> None:
        own = weakref.ref(self)

        def forget(_: object) -> None:
            if (shared := own()) is not None:
                shared.forget()

        self._x = weakref.ref(x, forget)
        self._state = _state(x)
        self._region = _region()
        self._readers = {reader}
        self._casts: dict[torch.dtype, Tensor] = {}
        self._masks: dict[float, Tensor] = {}
        self._dropped: dict[tuple[float, torch.dtype], Tensor] = {}
        self.pool = Pool()
        self._link: Tensor | None = None

    def takes(self, x: Tensor, reader: int) -> bool:
        """Tell whether a reader, known by a number, may use this for `x`; note that it does."""
        if self._region is None or self._region != _region():
            return False
        if self._x() is not x or self._state != _state(x) or reader in self._readers:
            return False
        self._readers.add(reader)
        return True

    def read(self, x: Tensor, p: float, dtype: torch.dtype) -> Input:
        """Return the input in `dtype`, with dropout; what dropout keeps is not scaled up.

        Its `x` is a node of its own, which sums what the readers leave in the pool.
        """
        if self._link is None and x.requires_grad and torch.is_grad_enabled():
            self._link = _Link.apply(x, self.pool)  # type: ignore[no-untyped-call]
        link = x if self._link is None else self._link
        cast = self._cast(x, dtype)
        recipe = recipe_of(x) if cast is x else None
        if not p:
            return Input(link, cast, cast, None, recipe, self.pool)
        mask = self.mask(x, p)
        key = (rounded(p), dtype)
        if key not in self._dropped:
            self._dropped[key] = cast.detach() * mask
        return Input(link, cast, self._dropped[key], mask, recipe, self.pool)

    def forget(self) -> None:
        """Let go of all that was made of an input that is no more."""
        self._link = None
        self._casts, self._masks, self._dropped = {}, {}, {}

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Return which elements dropout keeps, as uint8."""
        if rounded(p) not in self._masks:
            self._masks[rounded(p)] = keep_mask(x, p)
        return self._masks[rounded(p)]

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if dtype not in self._casts:
            self._casts[dtype] = x.detach().to(dtype)
        return self._casts[dtype]


def shared_input(last: SharedInput | None, x: Tensor, reader: int) -> SharedInput:
    """Return `last` where the reader may share it for `x`, else a new one."""
    if last is not None and last.takes(x, reader):
        return last
    return SharedInput(x, reader)


def _state(x: Tensor) -> tuple[int, bool]:
    """Return what differs once `x` was changed in place."""
    return 0 if x.is_inference() else x._version, x.requires_grad


class _Link(torch.autograd.Function):
    """The identity; its gradient is what lies in the pool, and what flowed here besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.pool = pool
        ctx.shape = x.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, flowed: Tensor | None) -> tuple[Tensor | None, None]:
        dX = ctx.pool.take()
        if dX is None:
            return flowed, None
        dX = dX.view(ctx.shape)
        return dX if flowed is None else dX + flowed, None


def _product(alike: list[Left]) -> Tensor:
    if len(alike) == 1:
        return alike[0].dS @ alike[0].A
    return torch.cat([part.dS for part in alike], 1) @ torch.cat([part.A for part in alike])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())


def _region() -> object:
    """Return what tells the checkpointed region that runs now from others; None forbids sharing.

    The kind without reentrance runs under hooks of its own for saved tensors. The reentrant kind
    runs without gradients first; in its recomputation a backward pass runs and no such hooks.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        return weakref.ref(hooks[0]) if torch.is_grad_enabled() else None
    alone = torch._C._current_graph_task_id() == -1
    return "none" if alone and torch.is_grad_enabled() else None
