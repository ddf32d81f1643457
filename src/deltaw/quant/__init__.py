"""How the frozen weight is stored: one file per storage; a dense tensor needs none."""

import functools

from torch import nn

from deltaw.folder import classes_in
from deltaw.storage import Packer, Storage


@functools.cache
def storages() -> tuple[Storage, ...]:
    """Return one of each storage found in the files of this folder."""
    kinds = classes_in(__name__, Storage)  # type: ignore[type-abstract]
    return tuple(kind() for kind in kinds)


def storage_of(layer: nn.Module) -> Storage | None:
    """Return the storage of the layer's weight, or None where it is a dense tensor."""
    return next((storage for storage in storages() if storage.fits(layer)), None)


def kinds() -> dict[str, Packer]:
    """Return the names under which a weight can be packed, each with its storage."""
    packers = [storage for storage in storages() if isinstance(storage, Packer)]
    return {kind: packer for packer in packers for kind in packer.kinds}
