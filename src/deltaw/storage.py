"""How a frozen weight is kept: packed, and through a merge."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Storage(ABC):
    """How a weight is kept that is not a dense tensor: one subclass per file of `quant/`.

    `brings` are the attributes of a layer that belong to the packed weight, and leave with it.
    """

    brings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def fits(self, layer: nn.Module) -> bool:
        """Tell whether the weight of `layer` is stored in this way."""

    @abstractmethod
    def read(self, layer: nn.Module) -> Tensor:
        """Return the weight as a dense tensor in the layer's own layout, in float32."""

    @abstractmethod
    def store(self, layer: nn.Module, W: Tensor) -> Mapping[str, Tensor]:
        """Return the parameters and buffers of `layer` that hold W, by name.

        A parameter takes the place of the old one; of any other tensor the values do.
        """

    def plain(self, layer: nn.Module) -> type[nn.Module] | None:
        """Return the class that computes the same from a dense weight, which a merge gives it.

        Without one a merge packs again.
        """
        return None

    def shape(self, layer: nn.Module) -> torch.Size:
        """Return the shape of the dense weight."""
        return self.read(layer).shape

    def dtype(self, layer: nn.Module) -> torch.dtype | None:
        """Return the dtype that the weight was packed from, where it tells."""
        return None

    def differentiable(self, layer: nn.Module) -> bool:
        """Tell whether gradients pass through the layer's own product to its input."""
        return True

    def refusals(self, layer: nn.Module) -> list[str]:
        """Return the reasons why a layer stored in this way cannot be adapted."""
        return []

    def settle(self, layer: nn.Module) -> None:
        """Make the layer keep the bits of its weight in every forward pass, as most do."""
        return

    def unsettle(self, layer: nn.Module) -> None:
        """Undo `settle` on a layer that gets a dense weight."""
        return

    def held(self, layer: nn.Module) -> nn.Parameter:
        """Return the parameter with all that makes up the weight."""
        weight = layer._parameters["weight"]
        assert weight is not None
        return weight


class Packer(Storage):
    """A storage that `deltaw.quantize` packs linear layers in, under the names `kinds`."""

    kinds: ClassVar[tuple[str, ...]]

    @abstractmethod
    def misfits(self, layer: nn.Linear, kind: str, device: torch.device) -> list[str]:
        """Return the reasons why the dense weight of a linear layer cannot be packed there."""

    @abstractmethod
    def pack(self, layer: nn.Linear, kind: str, double: bool) -> None:
        """Pack the dense weight of a linear layer in place; `double` packs its scales too."""


@dataclass(frozen=True)
class Packed:
    """What a layer with a packed weight was before it got a dense one."""

    storage: Storage
    origin: type[nn.Module]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Original:
    """A weight as it was before a merge: where it is kept, and what the merged one looked like."""

    tensor: Tensor | None
    merged_bits: str
    parameter: nn.Parameter | None = None
    packed: Packed | None = None
    file: Path | None = None
    key: str | None = None
    bits: str | None = None


def inner(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of: those it wraps, or its own values."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.data]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in inner(getattr(tensor, name))]
