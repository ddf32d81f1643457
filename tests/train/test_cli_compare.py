"""`deltaw compare`: what the command line hands on, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest

from deltaw.compare import comparing
from deltaw.compare.methods import NAMED


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `compare` is called with."""
    found: dict[str, Any] = {}

    def compare(values: dict[str, Any], methods: dict[str, Any], **options: Any) -> None:
        found.update(options, values=values, methods=methods)

    monkeypatch.setattr(comparing, "compare", compare)
    return found


def test_everything_is_handed_on(deltaw_command: Any, asked: dict[str, Any]) -> None:
    code, _, err = deltaw_command(
        "compare", "m", "d.csv", "r=4", "--methods", "lora,dora", "--seeds", "3", "--lr",
        "1e-3,1e-4,1e-3", "-o", "out", "--jobs", "2", "--overwrite",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert asked == {
        "values": {"model": "m", "data": "d.csv", "r": 4},
        "methods": {name: NAMED[name] for name in ("lora", "dora")},
        "seeds": 3,
        "rates": (1e-4, 1e-3),
        "output": Path("out"),
        "jobs": 2,
        "overwrite": True,
        "leave_out": False,
    }


def test_a_recipe_and_the_usual_methods(
    deltaw_command: Any, asked: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: d\nr: 2\n")
    assert deltaw_command("compare", recipe, "r=3")[0] == 0
    assert asked["values"] == {"model": "m", "data": "d", "r": 3}
    assert asked["methods"].keys() < NAMED.keys() and {"full", "lora"} < asked["methods"].keys()
    assert (asked["rates"], asked["seeds"], asked["output"]) == ("auto", 5, None)
    assert asked["leave_out"]


def test_a_folder_goes_by_its_option(deltaw_command: Any, asked: dict[str, Any]) -> None:
    code, _, err = deltaw_command("compare", "m", "d", "output=here")
    assert code == 1 and "--output" in err and not asked


@pytest.mark.parametrize("rates", ["fast", "0", "1e-3,", "nan", "11", "1e-3;1e-4"])
def test_rates_that_are_none(deltaw_command: Any, asked: dict[str, Any], rates: str) -> None:
    code, _, err = deltaw_command("compare", "m", "d", "--lr", rates)
    assert code == 1 and "is no learning rate" in err and "auto, rule" in err and not asked


def test_methods_that_are_none(deltaw_command: Any, asked: dict[str, Any]) -> None:
    code, _, err = deltaw_command("compare", "m", "d", "--methods", "lora,lroa")
    assert code == 1 and "lroa is unknown; known are" in err and not asked


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_says_what_to_install(
    deltaw_command: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("deltaw.compare", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = deltaw_command("compare", "m", "d")
    assert code == 1
    assert err.splitlines()[-2:] == [
        f"error: deltaw compare needs {package}.",
        "Fix: pip install 'deltaw[compare]'",
    ]
