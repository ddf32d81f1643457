"""How a weight is applied to an input: one file per layer geometry."""

import functools

from torch import nn

from deltaw.folder import classes_in
from deltaw.layer import AdaptedLayer
from deltaw.state import LayerState

ANY = LayerState("", {})


@functools.cache
def geometries() -> tuple[type[AdaptedLayer], ...]:
    """Return the geometries found in the files of this folder."""
    return classes_in(__name__, AdaptedLayer)


def geometry_of(layer: nn.Module, like: LayerState = ANY) -> type[AdaptedLayer] | None:
    """Return the geometry that takes `layer` adapted as `like` asks, or None."""
    return next((found for found in geometries() if found.fits(layer, like)), None)
