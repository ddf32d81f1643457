"""A folder is the list of what is in it: adding a file is all it takes to add a kind."""

import functools
import importlib
import pkgutil
from typing import TypeVar

Kind = TypeVar("Kind")


@functools.cache
def files_in(package: str) -> tuple[str, ...]:
    """Return the names of the modules of a package that do not start with an underscore."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(file.name for file in found if not file.name.startswith("_")))


def classes_in(package: str, base: type[Kind]) -> tuple[type[Kind], ...]:
    """Return the subclasses of `base` that the files of a package define, file by file."""
    return tuple(
        found
        for file in files_in(package)
        for found in vars(importlib.import_module(f"{package}.{file}")).values()
        if isinstance(found, type)
        and issubclass(found, base)
        and found.__module__ == f"{package}.{file}"
    )
