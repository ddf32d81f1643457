"""What an adapter must do: turn the frozen matrix of one slot into the adapted one."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.errors import StateError

if TYPE_CHECKING:
    from deltaw.layer import AdaptedLayer


@dataclass(frozen=True)
class Slot:
    """One (out, in) matrix of a layer, as an adapter sees it.

    It is no module, so that hooks which move an adapter's arguments leave the layer where it is.
    """

    layer: "AdaptedLayer"
    name: str

    def matrix(self) -> Tensor:
        """Return the frozen weight as a dense (out, in) matrix."""
        return self.layer.matrix(self.name)

    def act(self, x: Tensor, M: Tensor) -> Tensor:
        """Return how the (out, in) matrix M acts on the layer's input."""
        return self.layer.act(x, M, self.name)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Return `act(x, scale * B A)` without forming B A."""
        return self.layer.low_rank(x, A, B, scale, self.name)

    def per_output(self, v: Tensor) -> Tensor:
        """Return a vector of length out, shaped to broadcast over the output."""
        return self.layer.per_output(v, self.name)


class Adapter(nn.Module):
    """The trainable tensors of one slot; a method of the literature is one subclass.

    `merged` is the equation of its paper. `delta` and `forward` follow from it; a method overrides
    them only with something equal and faster. `replaces` marks one that stands in for a parameter
    of the layer instead of adding to its output.
    """

    replaces: ClassVar[bool] = False
    dropout: float = 0.0

    @abstractmethod
    def merged(self, W: Tensor) -> Tensor:
        """Return W' for the frozen W, both (out, in), in `promote_types(float32, W.dtype)`."""

    def delta(self, W: Tensor) -> Tensor:
        """Return ΔW = W' - W, (out, in)."""
        return self.merged(W) - W

    def bias_delta(self) -> Tensor | None:
        """Return what is added to the layer's bias, (out,), or None."""
        return None

    def forward(self, x: Tensor, y: Tensor, slot: Slot) -> Tensor:
        """Return what the slot adds to the base output `y` for the input `x`."""
        W = slot.matrix()
        W = W.to(torch.promote_types(torch.float32, W.dtype))
        return slot.act(self.drop(x), self.delta(W))

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the input of the adapter, never to that of the base."""
        if self.dropout and self.training and x.is_floating_point():
            return nn.functional.dropout(x, self.dropout)
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_cast(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual, but leave the adapter alone where the file holds the base alone."""
        if any(prefix + name in state_dict for name in self.state_dict()):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


def refuse_cast(module: nn.Module, fn: Any) -> None:
    """Raise where `fn`, of `.half()`, `.to(...)` and the like, changes a floating-point dtype."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    for dtype in dtypes:
        cast = fn(torch.zeros(1, dtype=dtype)).dtype
        if cast != dtype:
            raise StateError(
                f"Casting an adapted model from {dtype} to {cast} would change the bits of its "
                "base and of its adapters.\nFix: detach, cast the base, then attach again; layers "
                f"of deltaw.compat.loralib take dtype={cast} where they are built."
            )
