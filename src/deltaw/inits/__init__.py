"""Where an adapter starts: one file per initialisation, with one function by what it starts from.

    start(site)                  nothing but random numbers
    from_weights(sites)          the frozen weights
    from_inputs(sites, run)      what each layer reads while the model runs on some data
    from_gradients(sites, run)   the gradient of each weight on some data
    from_packed(sites)           the frozen weights, and what packing makes of them

It returns A (r, in) and B (out, r) in float32, for one site or in a list for all. Where B A is not
zero, W is left as it is and s B A is subtracted beside it, so that any start begins at the base's
output; `attach(..., absorb=...)` takes s B A out of W instead, which `from_packed` asks for. A file
may also have `refusal(site)`, which says why a slot cannot start so, and `VARIANTS`, what may
follow its name, as in `pissa_niter_4`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.folder import files_in

KINDS = ("start", "from_weights", "from_inputs", "from_gradients", "from_packed")


def _as_it_is(W: Tensor) -> Tensor:
    return W


@dataclass(frozen=True)
class Site:
    """The slot that an adapter starts on.

    `name` is its path, and that of `layer` where the layer has one slot; `shape` is (out, in);
    `zero` names the factor that starts at zero ("A" for embeddings); `matrix` returns the frozen
    (out, in) weight; `variant` is what followed the start's name; `packed` returns what is left of
    a matrix (out, in) once it is packed as the weight is to be.
    """

    name: str
    layer: str
    shape: tuple[int, int]
    r: int
    scale: float
    zero: str
    generator: torch.Generator | None
    matrix: Callable[[], Tensor]
    variant: str = ""
    packed: Callable[[Tensor], Tensor] = _as_it_is


Factors = tuple[Tensor, Tensor]
See = Callable[[str, Tensor], None]
"""Takes inputs (rows, in) by the name of a layer, or gradients (out, in) by that of a site."""
Run = Callable[[See], None]
"""Runs the model on all data and shows what is seen there; it can be called once."""


def empty(rows: int, columns: int) -> Tensor:
    """Return a matrix to be filled, in float32 on the CPU whatever torch's defaults are."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def above(site: Site, r: int) -> str:
    """Return why no r singular vectors of the slot's matrix can be had, if so."""
    least = min(site.shape)
    what = "its rank" if r == site.r else f"{r // site.r} times its rank"
    return f"{what} of {site.r} is above min(out, in) = {least}" if r > least else ""


def kind_of(name: bool | str) -> str:
    """Return which of `KINDS` the start of that name is.

    Raises:
        ConfigError: if there is no such start.
    """
    return _kind(_find(name)[0])


def from_data(name: bool | str) -> bool:
    """Tell whether the start of that name starts from data."""
    return kind_of(name) in ("from_inputs", "from_gradients")


def at_zero(name: bool | str) -> bool:
    """Tell whether B A is zero at the start of that name, or is not subtracted again."""
    return kind_of(name) in ("start", "from_inputs")


def variant_of(name: bool | str) -> str:
    """Return what follows the file's name, as `niter_4` in `pissa_niter_4`."""
    return _find(name)[1]


def refusal(name: bool | str, site: Site) -> str:
    """Return why the slot cannot start so, or an empty string."""
    ask: Callable[[Site], str] | None = vars(_find(name)[0]).get("refusal")
    return ask(site) if ask else ""


def starts(name: bool | str, sites: Sequence[Site], run: Run | None = None) -> list[Factors]:
    """Return A and B of every site by the file of that name; True is Kaiming, False is random.

    `run` is for the starts from data.
    """
    module = _find(name)[0]
    function = vars(module)[_kind(module)]
    if _kind(module) == "start":
        return [function(site) for site in sites]
    found: list[Factors] = function(sites) if run is None else function(sites, run)
    return found


def names() -> list[str]:
    """Return the names of the initialisations, each one a file of this folder."""
    return list(files_in(__name__))


def _kind(module: ModuleType) -> str:
    return next(kind for kind in KINDS if kind in vars(module))


def _find(name: bool | str) -> tuple[ModuleType, str]:
    """Return the file that a name begins with, and what follows it."""
    if isinstance(name, bool):
        return _module("kaiming" if name else "_random"), ""
    for file in names():
        variants = ["", *_variants(file)]
        if any(re.fullmatch(_spelt(file, v).replace("_N", r"_\d+"), name) for v in variants):
            return _module(file), name.removeprefix(file).removeprefix("_")
    known = [_spelt(file, variant) for file in names() for variant in ("", *_variants(file))]
    raise ConfigError(
        f"init_lora_weights={name!r} is not known. Fix: use True, False, {', '.join(known)}."
    )


def _module(file: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{file}")


def _variants(file: str) -> Sequence[str]:
    variants: Sequence[str] = vars(_module(file)).get("VARIANTS", ())
    return variants


def _spelt(file: str, variant: str) -> str:
    return f"{file}_{variant}" if variant else file
