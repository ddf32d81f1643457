"""How a law runs over the product: half of the covering array, all of it, or everything (slow)."""

from collections import defaultdict
from collections.abc import Callable
from zlib import crc32

import pytest
import torch

from laws.cases import CASES, Case
from laws.product import Setting, everything, pairwise

Keep = Callable[[Setting], bool]
Law = Callable[..., None]


def always(setting: Setting) -> bool:
    """Keep every setting."""
    return True


def over_pairs(keep: Keep = always) -> Callable[[Law], Law]:
    """Parametrise `setting` by the covering array; half of each case's rows are slow.

    Which half goes by the law's name, so that all of them meet some law in every run.
    """

    def over(law: Law) -> Law:
        turn = crc32(law.__name__.encode()) % 2
        rows = defaultdict(list)
        for setting in pairwise():
            if keep(setting):
                rows[setting.case].append(setting)
        quick = {s for some in rows.values() for s in some[turn::2] or some}
        kept = [installed(s, case=s.case, slow=s not in quick) for r in rows.values() for s in r]
        return pytest.mark.parametrize("setting", kept, ids=str)(law)

    return over


def installed(*values: object, case: Case, slow: bool = False) -> object:
    """Values of parameters, skipped where the storage of `case` needs a package that is absent."""
    skip = [pytest.mark.skip(f"package absent: {case.absent}")] if case.absent else []
    return pytest.param(*values, marks=[*skip, *([pytest.mark.slow] if slow else [])])


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
