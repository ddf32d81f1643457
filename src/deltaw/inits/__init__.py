"""Where an adapter starts: one file per initialisation, each with a function `start`."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.folder import files_in


@dataclass(frozen=True)
class Site:
    """The slot that an adapter starts on.

    `name` is its path, for messages; `shape` is (out, in); `zero` names the factor that starts at
    zero ("A" for embeddings); `matrix` returns the frozen (out, in) weight for the starts that
    read it.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scale: float
    zero: str
    generator: torch.Generator | None
    matrix: Callable[[], Tensor]


def empty(rows: int, columns: int) -> Tensor:
    """Return a matrix to be filled, in float32 on the CPU whatever torch's defaults are."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


Factors = tuple[Tensor, Tensor]


def starts(name: bool | str, sites: Sequence[Site]) -> list[Factors]:
    """Return A and B of every site by the file of that name; True is Kaiming, False is random.

    A file has `start` for one site, or `starts` for all of them at once.

    Raises:
        ConfigError: if there is no such file.
    """
    file = ("kaiming" if name else "_random") if isinstance(name, bool) else name
    if not isinstance(name, bool) and name not in names():
        raise ConfigError(
            f"init_lora_weights={name!r} is not known. Fix: use True, False, {', '.join(names())}."
        )
    module = importlib.import_module(f"{__name__}.{file}")
    together: Callable[[Sequence[Site]], list[Factors]] | None = vars(module).get("starts")
    return together(sites) if together else [module.start(site) for site in sites]


def names() -> list[str]:
    """Return the names of the initialisations, each one a file of this folder."""
    return list(files_in(__name__))
