"""What the command line says when the fault is not the recipe's: packages, outputs, permissions."""

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli import PACKAGES


def test_without_the_trainer_it_says_what_to_install(
    deltaw_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "deltaw.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    code, out, err = deltaw_command("--version")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: The command line needs the trainer, and typer is not installed.",
        "Fix: pip install 'deltaw[train]'",
    ]


def test_the_trainers_packages_are_those_of_its_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["train"]
    asked = {line.partition(">=")[0] for line in extra}
    assert asked == {packages_distributions()[name][0].lower() for name in PACKAGES}
