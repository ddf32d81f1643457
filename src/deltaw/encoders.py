"""torch's encoders, which on their fast path read weights past the forward of every layer.

While an adapter in force lies in one of them, it goes layer by layer, as it does in training.
"""

from typing import TYPE_CHECKING

from torch import nn

from deltaw.layer import AdaptedLayer
from deltaw.swap import Swapped, swap

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
"""What torch asks, and takes no fast path and makes no nested tensors where it is false."""


class Stepwise(Swapped, _Module):
    """Mixin whose overridden attributes are false while an adapter in force lies in the module."""

    @staticmethod
    def override(name: str) -> property:
        """Return the property that stands in for a switch."""
        return property(lambda module: not _adapted(module) and vars(module)[name])


def walk_through(model: nn.Module) -> None:
    """Keep the encoders in `model` that hold adapted layers off their fast path."""
    for module in model.modules():
        names = tuple(name for kind, name in SWITCHES.items() if isinstance(module, kind))
        if names and any(isinstance(inner, AdaptedLayer) for inner in module.modules()):
            swap(module, type(module).mixin if isinstance(module, Swapped) else Stepwise, names)


def _adapted(module: nn.Module) -> bool:
    """Tell whether an adapter in force, for all rows or for some, lies in `module`."""
    for layer in module.modules():
        if isinstance(layer, AdaptedLayer):
            rows = layer.authority.row_map()
            names = [name for name, _ in layer.in_force()] if rows is None else rows.distinct
            if any(name in layer.adapter for name in names):
                return True
    return False
