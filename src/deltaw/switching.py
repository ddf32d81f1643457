"""Choosing which adapters count."""

import contextlib
import math
from collections.abc import Iterator, Mapping

from torch import nn

from deltaw.authority import Active
from deltaw.config import LoraConfig
from deltaw.errors import StateError, raise_all
from deltaw.root import find_authority, require_authority


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Make one adapter, a weighted sum of adapters, or none the active one.

    `ΔW = Σ weight ΔW_name`. Visits no layer and touches no `requires_grad`; in a compiled model
    without gradients it recompiles nothing.

    Args:
        model: an adapted model.
        which: a name, names with finite weights, or None for the base alone.

    Raises:
        StateError: listing every unknown name or weight that is not finite, or if merged.
    """
    authority = require_authority(model)
    authority.require_unmerged("activate")
    pairs: Active = ((which, 1.0),) if isinstance(which, str) else tuple((which or {}).items())
    problems = [
        f"there is no adapter {name!r}" for name, _ in pairs if name not in authority.configs
    ]
    problems += [f"the weight of {name!r} is {w}" for name, w in pairs if not math.isfinite(w)]
    have = ", ".join(authority.configs)
    raise_all(StateError, "Cannot activate:", problems, f"the adapters are: {have}.")
    authority.activate(tuple((name, float(weight)) for name, weight in pairs))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Give the base's own output within a `with` block, bit for bit.

    Raises:
        StateError: if the adapters are merged into the weights.
    """
    authority = require_authority(model)
    authority.require_unmerged("disable the adapters")
    before, authority.enabled = authority.enabled, False
    try:
        yield
    finally:
        authority.enabled = before


def configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the settings of a model's adapters by name; empty where it has none."""
    authority = find_authority(model)
    return dict(authority.configs) if authority else {}


def active(model: nn.Module) -> dict[str, float]:
    """Return the active adapters with their weights."""
    authority = find_authority(model)
    return dict(authority.active) if authority else {}
