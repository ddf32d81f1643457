"""What is wrong with the settings of a group of `GaLoreAdamW`."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deltaw.adapter import is_held
from deltaw.errors import printable
from deltaw.optim._moments import require_bits
from deltaw.optim._subspace import SIDES

BITS = (8, 32)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_betas(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(0 <= b < 1 for b in value)


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_number, "a number of 0 or more"),
    "betas": (_are_betas, "two numbers in [0, 1)"),
    "eps": (_is_number, "a number of 0 or more"),
    "weight_decay": (_is_number, "a number of 0 or more"),
    "rank": (lambda value: value is None or _is_count(value), "a whole number above 0"),
    "update_proj_gap": (_is_count, "a whole number above 0"),
    "scale": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "proj_type": (SIDES.__contains__, f"one of {', '.join(SIDES)}"),
    "exact_svd": (lambda value: isinstance(value, bool), "True or False"),
    "optim_bits": (BITS.__contains__, "8 or 32"),
}


def problems_of(group: Mapping[str, Any]) -> list[str]:
    """Return every setting that is out of range, and every parameter that cannot be projected.

    Raises:
        ConfigError: if moments in 8 bits need a package that is not installed.
    """
    found = [
        f"{key} must be {wanted}, got {group[key]!r}"
        for key, (fits, wanted) in RULES.items()
        if not fits(group[key])
    ]
    if group["rank"] is not None:
        found += _unprojectable(group)
    require_bits(group["optim_bits"])
    return found


def _unprojectable(group: Mapping[str, Any]) -> Iterator[str]:
    names = group.get("param_names", range(len(group["params"])))
    for name, parameter in zip(names, group["params"], strict=True):
        shown = printable(f"parameter {name}")
        if is_held(parameter):
            yield f"{shown} belongs to an adapter; GaLore trains a model's own weights: use AdamW"
        elif parameter.ndim != 2:
            yield f"{shown} has the shape {tuple(parameter.shape)} and is no matrix: give no rank"
