"""How a frozen weight is kept: packed, and through a merge."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Original:
    """A weight as it was before a merge: where it is kept, and what the merged one looked like."""

    tensor: Tensor | None
    merged_bits: str
    parameter: nn.Parameter | None = None
    file: Path | None = None
    key: str | None = None
    bits: str | None = None


class Storage(ABC):
    """How a weight is kept that is not a dense tensor: one subclass per file of `quant/`."""

    @abstractmethod
    def fits(self, layer: nn.Module) -> bool:
        """Tell whether the weight of `layer` is stored in this way."""

    @abstractmethod
    def read(self, layer: nn.Module) -> Tensor:
        """Return the weight as a dense tensor in the layer's own layout."""

    @abstractmethod
    def store(self, layer: nn.Module, W: Tensor) -> Mapping[str, Tensor]:
        """Return the parameters and buffers of `layer` that hold W, by name."""
