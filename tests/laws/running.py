"""How a law runs over the product: the covering array by default, everything when slow."""

from collections.abc import Callable

import pytest
import torch

from laws.cases import CASES, Case
from laws.product import Setting, everything, pairwise

Keep = Callable[[Setting], bool]


def always(setting: Setting) -> bool:
    """Keep every setting."""
    return True


def over_pairs(keep: Keep = always) -> pytest.MarkDecorator:
    """Parametrise `setting` by the covering array."""
    return pytest.mark.parametrize("setting", [s for s in pairwise() if keep(s)], ids=str)


def over_cases(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrise `case`."""
    return pytest.mark.parametrize("case", [c for c in CASES if keep(c)], ids=str)


def whole_product(case: Case, law: Callable[[Setting], None], keep: Keep = always) -> None:
    """Check a law on every setting of a case and list all that break it."""
    broken = []
    for setting in everything(case):
        if keep(setting):
            torch.manual_seed(0)
            try:
                law(setting)
            except Exception as problem:
                broken.append(f"{setting}: {type(problem).__name__} {str(problem)[:200]}")
    if broken:
        raise AssertionError("\n".join([f"{len(broken)} settings:", *broken]))
