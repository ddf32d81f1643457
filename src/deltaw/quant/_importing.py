"""Importing the packages that pack weights, quietly, or saying what to install."""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deltaw.errors import ConfigError


def imported(module: str, extra: str) -> Any:
    """Return a module of the package that the extra of deltaw installs.

    Raises:
        ConfigError: if it cannot be imported.
    """
    try:
        with _unlogged(), _kernels_hidden():
            return importlib.import_module(module)
    except ImportError as problem:
        package = module.partition(".")[0]
        raise ConfigError(
            f"These packed weights need {package}, which cannot be imported: {problem}.\n"
            f'Fix: pip install "deltaw[{extra}]"'
        ) from None


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep quiet what a package says of kernels that it cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _kernels_hidden() -> Iterator[None]:
    """Keep bitsandbytes from asking the hub for a kernel, where the package `kernels` is there."""
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
