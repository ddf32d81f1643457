"""What the command line says when the fault is not the recipe's: packages, outputs, permissions."""

import io
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli import PACKAGES
from deltaw.cli.reporting import reported
from deltaw.train.console import Console


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


def test_letters_that_the_output_has_none_for_are_spelt_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    reported(lambda: Console().field("labels", "→ é"))
    assert written.getvalue() == b"labels    \\u2192 \xe9\n"


class Full(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        """Refuse it."""
        raise OSError(28, "No space left on device")


def test_an_output_without_room_does_not_end_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    console = Console()
    console.log_to(tmp_path / "log.jsonl")
    console.line("one")
    console.field("two", "three")
    assert capsys.readouterr().err.count("cannot be written, and work goes on without: [Errno 28]") == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
