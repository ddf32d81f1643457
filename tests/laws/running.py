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
    kept = [installed(s, case=s.case) for s in pairwise() if keep(s)]
    return pytest.mark.parametrize("setting", kept, ids=str)


def installed(*values: object, case: Case) -> object:
    """Values of parameters, skipped where the storage of `case` needs a package that is absent."""
    skip = [pytest.mark.skip(f"package absent: {case.absent}")] if case.absent else []
    return pytest.param(*values, marks=skip)


def over_cases(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrise `case`."""
    kept = [installed(c, case=c) for c in CASES if keep(c)]
    return pytest.mark.parametrize("case", kept, ids=str)


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
