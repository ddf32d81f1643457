"""Tensors that are made again in the backward pass from others that are kept anyway.

A block's norm and its gated product leave with their output how to make it again. An adapter that
reads such an output keeps the recipe's tensors instead, which the block keeps for its own backward
pass too, so that they cost nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recipe(NamedTuple):
    """A tensor, as it was in one version, as a function of others."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int = 0


def leave(output: Tensor, make: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """Return `output` after leaving with it that it is `make(*of)`."""
    output._recipe = Recipe(make, of, output._version)  # type: ignore[attr-defined]
    return output


def recipe_of(x: Tensor) -> Recipe | None:
    """Return what was left with `x`, if it was not changed since."""
    kept: Recipe | None = getattr(x, "_recipe", None)
    return kept if kept is not None and kept.version == x._version else None
