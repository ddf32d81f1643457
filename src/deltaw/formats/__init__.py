"""How an adapter is written down: one file per format, each with `sniff`, `read` and `write`."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from deltaw.errors import FormatError
from deltaw.folder import files_in
from deltaw.formats._files import names_in, of_mlx, require_readable, shown
from deltaw.state import State

Misfits = Callable[[State], list[str]]


def no_misfits(state: State) -> list[str]:
    """Return nothing: there is no model to fit."""
    return []


class Format(Protocol):
    """What a file of this folder offers."""

    def sniff(self, path: Path) -> bool:
        """Tell whether `path` looks like this format, without reading tensors."""

    def read(self, path: Path, misfits: Misfits = ..., *, finite: bool = True) -> State:
        """Return the adapter at `path`.

        `misfits` gets a state of the shapes alone before anything is read, and returns what does
        not fit the model; the reader raises one error with that and what it found wrong itself.
        NaN and Inf are refused where `finite`.
        """

    def write(self, state: State, path: Path) -> None:
        """Write `state` to `path`, whole or not at all."""


def names() -> list[str]:
    """Return the formats: the files of this folder."""
    return list(files_in(__name__))


def format_of(name: str) -> Format:
    """Return the format of that name."""
    if name not in names():
        raise FormatError(f"There is no format {name!r}. Fix: use {', '.join(names())}.")
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def sniff(path: Path) -> Format:
    """Return the format of what lies at `path`."""
    if not os.path.exists(path):
        raise FormatError(
            f"There is no adapter at {shown(path)}. Fix: give the folder or file of one."
        )
    require_readable(path)
    for name in names():
        if format_of(name).sniff(path):
            return format_of(name)
    if any(name.endswith(".lora_a") for name in names_in(path)):
        raise of_mlx(path)
    below = sorted(
        shown(config.parent.relative_to(path)) for config in path.glob("*/adapter_config.json")
    )
    if below:
        raise FormatError(
            f"{shown(path)} holds several adapters. Fix: name one of {', '.join(below)}."
        )
    raise FormatError(
        f"{shown(path)} is no adapter in a known format ({', '.join(names())}).\n"
        "Fix: give a folder with adapter_config.json, or name the format."
    )
