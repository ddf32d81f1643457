"""One tiny model, one table and one finished run, shared by the tests of runs."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.models import make_model, messages, write_csv

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.csv`."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    write_csv(folder / "data.csv", messages(60))
    return folder


@pytest.fixture
def deltaw_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process; return exit code, output and errors."""
    from deltaw.cli import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that came to its end."""
    from deltaw.train.recipe import parse
    from deltaw.train.run import train

    output = tmp_path_factory.mktemp("finished") / "run"
    values = {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "output": str(output),
        "max_steps": 6,
        "learning_rate": 0.02,
    }
    return train(parse(values), silent=True)
