"""Every named mutant is killed by its law, and the documentation has the table of them."""

import re
from pathlib import Path

import pytest
import torch

from laws.mutants import MUTANTS, Mutant

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"


@pytest.fixture(autouse=True)
def clean() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_killed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.check()
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        mutant.apply(patch)
        with pytest.raises(BaseException) as death:
            mutant.check()
    assert issubclass(death.type, (AssertionError, pytest.fail.Exception)), repr(death.value)


def test_there_are_enough() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 20
    assert {m.law for m in MUTANTS} == set(range(1, 12))


def table() -> str:
    """The table mutant -> law, in markdown."""
    rows = [f"| {m.name} | {m.law} |" for m in sorted(MUTANTS, key=lambda m: (m.law, m.name))]
    return "\n".join(["| mutant | killed by law |", "|---|---|", *rows])


def test_the_page_has_the_table() -> None:
    print(table())
    text = PAGE.read_text("utf-8")
    found = re.search(r"<!-- mutants -->\n(.*)\n<!-- end -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == table()
