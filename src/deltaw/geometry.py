"""How a layer applies its weight: what each file of `layers/` says of one geometry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter, Rescaled
from deltaw.state import LayerState
from deltaw.storage import Storage
from deltaw.swap import Swapped

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

WEIGHT = "weight"


class Geometry(Swapped, _Module):
    """Mixin put in front of a layer's own class, without what adapters do in a forward pass.

    A slot is one (out, in) matrix of the layer; methods see slots and never a layer type. What
    raises `NotImplementedError` here is each geometry's own: an object gets this class by swapping,
    which `abc` never checks, and a geometry without slots (`layers/module.py`) is never asked.
    """

    kind: ClassVar[str]
    takes: ClassVar[str] = ""
    zero_factor: ClassVar[str] = "B"
    tells_rows: ClassVar[bool] = True
    storage: Storage | None = None

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Tell whether this geometry takes `layer` adapted as `like` asks."""
        raise NotImplementedError

    @classmethod
    def refusals(cls, layer: nn.Module) -> list[str]:
        """Return the reasons why this particular layer cannot be adapted."""
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            return ["its shape is not known before the first forward pass"]
        if layer._parameters.get(WEIGHT) is None:
            return ["its weight is computed (a parametrisation), not a parameter"]
        return []

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer's own class computes what this geometry takes it for."""
        return True

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original forward of the layer, whatever it is."""
        output: Tensor = self.origin.forward(self, *args, **kwargs)
        return output

    @classmethod
    def overrides(cls, slot: str, adapter: Adapter) -> bool:
        """Tell whether the attribute of the slot's name is read through the adapter."""
        return adapter.replaces

    def holder(self, slot: str) -> str:
        """Return the name of the parameter that a slot lies in."""
        return WEIGHT

    def bias_name(self, slot: str) -> str:
        """Return the name of the parameter that is added to the output of a slot."""
        return "bias"

    def stacked(self, slot: str) -> int:
        """Return how many matrices a slot holds along a leading axis; 0 where it is one matrix."""
        return 0

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in) of a slot."""
        raise NotImplementedError

    def slots(self, enabled: Sequence[bool]) -> tuple[str, ...]:
        """Return the slots that are adapted where `enabled` marks them, or by default."""
        return (WEIGHT,)

    def matrix(self, slot: str) -> Tensor:
        """Return the frozen weight of a slot as a dense (out, in) matrix."""
        raise NotImplementedError

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return an (out, in) matrix of a slot as a tensor in the layout of the whole weight.

        It is zero where the slot does not lie.
        """
        raise NotImplementedError

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor] | None:
        """Return L and R with L R = `layout(B A)`, that read as a matrix; None where none are."""
        return None

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Return how the (out, in) matrix M of a slot acts on the input, without bias."""
        raise NotImplementedError

    def rescaled(self, x: Tensor, update: Rescaled, slot: str, base: Tensor | None) -> Tensor:
        """Return `act(x, ΔW)` without forming B A; `base` is the base's output for this x."""
        gain = self.per_output(update.gain, slot)
        whole = (
            self.act(x, self.matrix(slot), slot) if base is None else self.product(x, base, slot)
        )
        low = self.low_rank(x, update.A, update.B, update.scale, slot)
        return (gain - 1) * whole + gain * low

    def product(self, x: Tensor, base: Tensor, slot: str) -> Tensor:
        """Return `act(x, W)` for the frozen W of a slot, where `base` is the base's output."""
        return self.act(x, self.matrix(slot), slot)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Return `act(x, scale * B A)` without forming B A, computed in the dtype of the base."""
        raise NotImplementedError

    def per_output(self, v: Tensor, slot: str) -> Tensor:
        """Return a vector of length out, shaped to broadcast over the output."""
        return v

    def spread(self, v: Tensor, slot: str) -> Tensor:
        """Return a vector of length out of a slot as one over the layer's whole output."""
        return v

    def place(self, y: Tensor, delta: Tensor, slot: str) -> Tensor:
        """Return the output `y` with `delta` of a slot added."""
        return y + delta.to(y.dtype)

    def packed_shapes(self, slot: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in `LayerState` for rank r."""
        out, into = self.shape(slot)
        return (r, into), (out, r)

    def pack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Bring factors from (r, in), (out, r) into the shapes of `LayerState`."""
        return A, B

    def unpack(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Bring factors from the shapes of `LayerState` into (r, in), (out, r)."""
        return A, B

    def dense(self) -> Tensor:
        """Return the frozen weight as a dense tensor in the layer's own layout."""
        return self.frozen(WEIGHT) if self.storage is None else self.storage.read(self)

    def dense_shape(self) -> torch.Size:
        """Return the shape of `dense()`."""
        return self.frozen(WEIGHT).shape if self.storage is None else self.storage.shape(self)

    def frozen(self, name: str) -> Tensor:
        """Return the base's own parameter or buffer, whatever is trained in its place."""
        tensor: Tensor | None = self._parameters.get(name)
        if tensor is None:
            module, own = self.owner(name)
            tensor = module._parameters[own] if own in module._parameters else module._buffers[own]
        assert tensor is not None
        return tensor

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that has a parameter or buffer, and what it calls it.

        It is the layer itself, or a child whose parameters the layer reads past its forward.
        """
        path, _, own = name.rpartition(".")
        return (self.get_submodule(path) if path else self), own
