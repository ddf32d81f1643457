"""What an adapted layer must offer to the methods: one subclass per geometry in `layers/`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.adapter import Adapter, LowRank, Rescaled
from deltaw.authority import Active, Authority
from deltaw.copies import Copies, mixed
from deltaw.errors import DeltawError, StateError
from deltaw.geometry import WEIGHT, Geometry
from deltaw.kernels import PLAIN, why_not
from deltaw.kernels.dropout import rounded
from deltaw.kernels.shared import Input, SharedInput, shared_input
from deltaw.mismatch import explain
from deltaw.offload import is_placing, is_sharded
from deltaw.parts import Part, weighted
from deltaw.readable import Readable
from deltaw.rowmap import Division, RowMap, Seen
from deltaw.rowwise import RowError, each_row
from deltaw.storage import Original


class AdaptedLayer(Geometry):
    """A layer and what its adapters do in a forward pass; one subclass per file of `layers/`.

    The child module `adapter` holds `<adapter name>.<slot>`.
    """

    authority: Authority
    adapter: nn.ModuleDict
    originals: dict[str, Original]

    def fused(self, x: Tensor, parts: Sequence[Part]) -> Tensor | None:
        """Return the base's output with all parts added by one kernel; None where none applies."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base and add what the active adapters contribute, or those of each row."""
        authority = self.authority
        if authority.merged is not None and self.training and torch.is_grad_enabled():
            self._refuse_training(authority.merged)
        try:
            rows = authority.row_map()
            if rows is not None:
                return self.by_rows(rows, *args, **kwargs)
            return self.alike(*args, **kwargs)
        except RuntimeError as problem:
            if not isinstance(problem, (DeltawError, torch.OutOfMemoryError)):
                explain(self, next(iter((*args, *kwargs.values())), None), self.storage is not None)
            raise

    def _refuse_training(self, merged: Active) -> None:
        """Raise where adapters that are merged would be trained, and get no gradient."""
        if any(parameter.requires_grad for parameter in self.adapter.parameters()):
            raise StateError(
                f"Cannot train: adapter {', '.join(name for name, _ in merged)} is merged into the "
                "weights, and would get no gradient.\n"
                "Fix: to train, call deltaw.unmerge(model) first; to predict, call model.eval() or "
                "use torch.no_grad()."
            )

    def alike(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base and add the active adapters for all rows, in one kernel if possible."""
        parts = self.contributions()
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if parts and len(args) + len(kwargs) == 1:
            output = self.fused(x, parts)
            if output is not None:
                return output
        return self.added(x, self.base(*args, **kwargs), parts)

    def by_rows(self, rows: RowMap, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base and add to each row what its own adapter contributes."""
        return each_row(self, rows, args, kwargs)

    def added(
        self,
        x: Tensor,
        base: Tensor,
        parts: Sequence[Part],
        dropped: Mapping[float, Tensor] | None = None,
    ) -> Tensor:
        """Return the base's output with what the active adapters contribute for the input x.

        `dropped` is what dropout left of x, by probability, where that is known.
        """
        y = base
        dropped = self.dropped(x, parts) if dropped is None else dropped
        for slot, update, weight, p in parts:
            read = dropped.get(p, x)
            if isinstance(update, LowRank):
                delta = self.low_rank(read, update.A, update.B, update.scale, slot)
            elif isinstance(update, Rescaled):
                delta = self.rescaled(read, update, slot, None if p else base)
            else:
                delta = self.act(read, update.M, slot)
            if update.shift is not None:
                delta = delta + self.per_output(update.shift, slot).to(delta.dtype)
            y = self.place(y, weighted(delta, weight), slot)
        return y

    def joins(self) -> bool:
        """Tell whether a kernel may compute the base's own product: of a frozen dense weight."""
        return (
            self.storage is None
            and self.plain(self)
            and WEIGHT not in type(self).overridden
            and not self.frozen(WEIGHT).requires_grad
            and type(self.frozen(WEIGHT)) in PLAIN
        )

    def dropped(self, x: Tensor, parts: Sequence[Part]) -> dict[float, Tensor]:
        """Return by probability the input of the adapters that have dropout now."""
        probabilities = dict.fromkeys(p for *_, p in parts if p and x.is_floating_point())
        if not probabilities or why_not(x):
            return {p: F.dropout(x, p) for p in probabilities}
        shared = self.shared(x)
        return {p: x * shared.mask(x, p) / (1 - rounded(p)) for p in probabilities}

    def reading(self, x: Tensor, p: float, dtype: torch.dtype) -> Input:
        """Return the input as base and adapters read it.

        It is shared with the layers that read the same input; ask once per forward pass.
        """
        if not p and x.dtype == dtype and not torch.is_grad_enabled():
            return Input(x, x, x, None)
        return self.shared(x).read(x, p, dtype)

    def shared(self, x: Tensor) -> SharedInput:
        """Return what layers share that read the same input; ask once per forward pass."""
        self.authority.shared = shared_input(self.authority.shared, x, id(self))
        return self.authority.shared

    def parts(self, name: str) -> Mapping[str, Adapter]:
        """Return what the adapter `name` holds for each slot of this layer, if anything."""
        held = self.adapter[name].items() if name in self.adapter else ()  # type: ignore[operator]
        return dict(held)

    def in_force(self) -> Sequence[tuple[str, float | Tensor]]:
        """Return the (adapter name, weight) pairs that count now.

        In a compiled graph without gradients these are all adapters, each under a weight kept in a
        tensor, so that switching recompiles nothing; elsewhere only the active ones.
        """
        authority = self.authority
        if not torch.compiler.is_compiling():
            return authority.note_forward()
        if authority.several() and not torch.is_grad_enabled():
            return [(name, authority.mix[i]) for i, name in enumerate(authority.configs)]
        return authority.current()

    def fused_rows(self, x: Tensor, seen: Seen, division: Division) -> Tensor | None:
        """Return the base's output with each row under its own adapter, from a kernel.

        None where no kernel applies.
        """
        return None

    def contributors(
        self, active: Iterable[tuple[str, float | Tensor]] | None = None
    ) -> Iterator[tuple[str, Adapter, float | Tensor]]:
        """Yield (slot, adapter, weight) of the low-rank adapters in force, or of those given."""
        held = cast(nn.ModuleDict, self._modules["adapter"])._modules
        for name, weight in self.in_force() if active is None else active:
            if name in held:
                for slot, adapter in cast(dict[str, Adapter], held[name]._modules).items():
                    if not adapter.replaces:
                        yield slot, adapter, weight

    def contributions(
        self, active: Iterable[tuple[str, float | Tensor]] | None = None
    ) -> list[Part]:
        """Return what the adapters in force, or those given, add in this forward pass."""
        return [
            Part(
                slot,
                adapter(partial(self.matrix, slot)),
                weight,
                adapter.dropout if adapter.training else 0.0,
            )
            for slot, adapter, weight in self.contributors(active)
        ]

    @staticmethod
    def override(name: str) -> property:
        """Return the property that gives the trained copy of a parameter or buffer in its place."""
        return property(lambda layer: layer.effective(name))

    def effective(self, name: str) -> Any:
        """Return `P + Σ weight (copy - P)` for the frozen P; of one adapter the copy itself.

        While FSDP2 holds P in shards or accelerate has it offloaded, which is never within a
        forward, and to accelerate when it moves P, this is P itself.
        """
        frozen = self.frozen(name)
        if not torch.compiler.is_compiling() and (
            frozen.is_meta or is_sharded(frozen) or is_placing()
        ):
            return frozen
        rows = self.authority.row_map()
        if rows is not None and self.copies(name, [(key, 1.0) for key in rows.distinct]):
            raise RowError(self, f"has its {name} read past its forward, where rows look alike")
        P = mixed(frozen, self.copies(name, self.in_force()))
        return self.adapted(name, P if isinstance(P, Readable) else P.to(frozen.dtype))

    def adapted(self, name: str, P: Tensor | Readable) -> Any:
        """Return what a reader of the parameter or buffer gets; P has what is trained in full."""
        return P

    def copies(self, name: str, active: Iterable[tuple[str, float | Tensor]]) -> Copies:
        """Return the (trained copy, weight) pairs of a parameter or buffer among `active`."""
        owner, own = self.owner(name)
        if owner is not self:
            return owner.copies(own, active) if isinstance(owner, AdaptedLayer) else []
        return [
            (part(), weight)
            for key, weight in active
            for slot, part in self.parts(key).items()
            if slot == name and part.replaces
        ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.authority.require_changeable("load a checkpoint")
        if not self.authority.absorbed:
            self.authority.fingerprints.clear()
        elif not any(key.startswith(f"{prefix}adapter.") for key in state_dict):
            self.authority.require_base("load a checkpoint of the base")
        super()._load_from_state_dict(state_dict, prefix, *args)
