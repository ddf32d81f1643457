"""What the command line says when the fault is not the recipe's: packages, outputs, permissions."""

import io
import os
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.cli import PACKAGES
from deltaw.cli.reporting import reported
from deltaw.config import LoraConfig
from deltaw.formats import peft
from deltaw.state import LayerState, State
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
    said = capsys.readouterr().err
    assert said.count("cannot be written, and work goes on without: [Errno 28]") == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_what_may_not_be_read_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> None:
        raise PermissionError(13, "Permission denied", "/run/\nrecipe.yaml")

    with pytest.raises(SystemExit) as stop:
        reported(look)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: /run/\\nrecipe.yaml: permission denied\n"
        "Fix: check the permissions, or give another path.\n"
    )


@pytest.mark.parametrize("part", ["adapter", "adapter_model.safetensors"])
def test_an_adapter_that_may_not_be_read_is_not_called_damaged(
    deltaw_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    layer = LayerState("linear", {f"weight.lora_{x}": torch.ones(1, 1) for x in "AB"}, 1.0)
    peft.write(State(LoraConfig(r=1), {"a": layer}), tmp_path / "adapter")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != part)
    code, _, err = deltaw_command("inspect", tmp_path / "adapter")
    assert code == 1
    assert err.endswith(f"{part} cannot be read: permission denied.\nFix: check its permissions.\n")
