"""What an adapter does to W: one file per method, each with a function `build`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaw.adapter import Adapter
from deltaw.errors import ConfigError
from deltaw.folder import files_in


@dataclass(frozen=True)
class Parts:
    """What an adapter of one slot is built from.

    A (r, in), B (out, r) and perhaps a bias (out,), in the dtype and on the device to keep them;
    `extra` holds the method's further tensors by name when it comes from a file, and `matrix`
    returns the frozen (out, in) weight for methods that measure it at the start; `absorbed` tells
    that the start in `extra` is about to be taken out of that weight.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    bias: Tensor | None
    extra: Mapping[str, Tensor]
    matrix: Callable[[], Tensor]
    absorbed: bool = False


def names() -> list[str]:
    """Return the methods: the files of this folder that have a `build`."""
    return [
        name
        for name in files_in(__name__)
        if "build" in vars(importlib.import_module(f"{__name__}.{name}"))
    ]


def builder_of(method: str) -> Callable[[Parts], Adapter]:
    """Return the function `build` of the file of that name.

    Raises:
        ConfigError: if there is no such method.
    """
    if method not in names():
        raise ConfigError(f"method={method!r} is not known. Fix: use {', '.join(names())}.")
    build: Callable[[Parts], Adapter] = importlib.import_module(f"{__name__}.{method}").build
    return build
