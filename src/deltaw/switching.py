"""Choosing which adapters count."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from numbers import Real

from torch import nn

from deltaw.authority import Active
from deltaw.config import LoraConfig
from deltaw.errors import StateError, raise_all
from deltaw.root import find_root, require_root


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Make one adapter, a weighted sum of adapters, or none the active one.

    `ΔW = Σ weight ΔW_name`. Visits no layer and touches no `requires_grad`; in a compiled model
    without gradients it recompiles nothing.

    Args:
        model: an adapted model.
        which: a name, names with finite weights, or None for the base alone.

    Raises:
        StateError: listing every unknown name or weight that is not finite; or if merged, or the
            adapter's start was absorbed and anything but it alone is asked for.
    """
    authority = require_root(model).authority
    authority.require_changeable("activate")
    if which is not None and not isinstance(which, (str, Mapping)):
        raise StateError(f"Cannot activate {which!r}. Fix: give a name, {{name: weight}} or None.")
    pairs: Active = ((which, 1.0),) if isinstance(which, str) else tuple((which or {}).items())
    problems = [
        f"there is no adapter {name!r}" for name, _ in pairs if name not in authority.configs
    ]
    problems += [f"the weight of {name!r} is {w!r}" for name, w in pairs if not _finite(w)]
    have = ", ".join(authority.configs)
    fix = f"give finite numbers as weights; the adapters are: {have}."
    raise_all(StateError, "Cannot activate:", problems, fix)
    if dict(pairs) != dict(authority.active):
        authority.require_base("activate another sum")
    authority.activate(tuple((name, float(weight)) for name, weight in pairs if weight))


def _finite(weight: object) -> bool:
    return isinstance(weight, Real) and math.isfinite(weight)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Give the base's own output within a `with` block, bit for bit.

    Raises:
        StateError: if the adapters are merged into the weights, or a start was absorbed into them.
    """
    authority = require_root(model).authority
    authority.require_unmerged("disable the adapters")
    authority.require_base("disable the adapters")
    before, authority.enabled = authority.enabled, False
    try:
        yield
    finally:
        authority.enabled = before


def configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the settings of a model's adapters by name; empty where it has none."""
    root = find_root(model)
    return dict(root.authority.configs) if root is not None else {}


def active(model: nn.Module) -> dict[str, float]:
    """Return the active adapters with their weights."""
    root = find_root(model)
    return dict(root.authority.active) if root is not None else {}
