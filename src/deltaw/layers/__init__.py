"""How a weight is applied to an input: one file per layer geometry."""

import functools
import importlib
import pkgutil

from torch import nn

from deltaw.layer import AdaptedLayer
from deltaw.state import LayerState

ANY = LayerState("", {})


@functools.cache
def geometries() -> tuple[type[AdaptedLayer], ...]:
    """Return the geometries found in the files of this folder."""
    modules = [
        importlib.import_module(f"{__name__}.{file.name}")
        for file in pkgutil.iter_modules(__path__)
    ]
    return tuple(
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, AdaptedLayer)
        and found.__module__ == module.__name__
    )


def geometry_of(layer: nn.Module, like: LayerState = ANY) -> type[AdaptedLayer] | None:
    """Return the geometry that takes `layer` adapted as `like` asks, or None."""
    return next((found for found in geometries() if found.fits(layer, like)), None)
