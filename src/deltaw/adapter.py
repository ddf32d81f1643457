"""What an adapter must do: turn the frozen matrix of one slot into the adapted one."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from deltaw.errors import StateError

_held: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_held(parameter: Tensor) -> bool:
    """Tell whether a parameter is that of an adapter, in whatever optimiser it is met."""
    return parameter in _held


class LowRank(NamedTuple):
    """ΔW = scale B A by its factors A (r, in) and B (out, r); `shift` (out,) is for the bias."""

    A: Tensor
    B: Tensor
    scale: float | Tensor
    shift: Tensor | None = None


class Dense(NamedTuple):
    """ΔW (out, in) as a matrix; `shift` (out,) is for the bias."""

    M: Tensor
    shift: Tensor | None = None


class Rescaled(NamedTuple):
    """ΔW = g ∘ (W + scale B A) - W by A (r, in), B (out, r) and g (out,), one for every row."""

    A: Tensor
    B: Tensor
    scale: float | Tensor
    gain: Tensor
    shift: Tensor | None = None

    def matrix(self, W: Tensor) -> Tensor:
        """Return ΔW (out, in) for the frozen W, in the dtype of gain."""
        gain = self.gain.unsqueeze(-1)
        low = self.scale * self.B.to(gain.dtype) @ self.A.to(gain.dtype)
        return (gain - 1) * W + gain * low


Update = LowRank | Dense | Rescaled


class TokenRows(NamedTuple):
    """Rows `ids` (n,) of a table (vocabulary, width) that `values` (n, width) take the place of."""

    ids: Tensor
    values: Tensor


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

    def forward(self, matrix: Callable[[], Tensor]) -> Update:
        """Return ΔW for a forward pass, by its factors where it has them.

        It is called in every pass, so that hooks of the adapter take part; `matrix` returns the
        frozen W (out, in), and is no module, which hooks would move with the other arguments.
        """
        W = matrix()
        W = W.to(torch.promote_types(torch.float32, W.dtype))
        return Dense(self.delta(W), self.bias_delta())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Note the parameter as one of an adapter."""
        super().register_parameter(name, param)
        if param is not None:
            _held[param] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _held.update(dict.fromkeys(self.parameters(), True))

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
