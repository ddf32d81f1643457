"""The live bar: what it shows before anything is known, and whether it fits."""

import io
import itertools
import re
from types import SimpleNamespace

import pytest
from rich.console import Console as Terminal

from deltaw.train.console import Console
from deltaw.train.progress import ProgressBar


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns gets, by a clock that ticks when it is read."""
    file = io.StringIO()
    monkeypatch.setattr(
        "deltaw.train.progress.Terminal",
        lambda: Terminal(file=file, force_terminal=True, width=80, color_system=None),
    )
    clock = itertools.count()
    monkeypatch.setattr(
        "deltaw.train.progress.time", SimpleNamespace(monotonic=lambda: next(clock) / 100)
    )
    return file


def frames(seen: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", seen.getvalue()).split("\n")


def test_before_the_first_loss_it_shows_a_dash(seen: io.StringIO) -> None:
    with ProgressBar(Console(), 16, "accuracy") as bar:
        bar.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=50), None)
    text = seen.getvalue()
    assert "loss - - examples/s" in text
    assert "nan" not in text


def test_a_long_run_fits_into_80_columns(seen: io.StringIO) -> None:
    state = SimpleNamespace(global_step=98_765, max_steps=99_999)
    with ProgressBar(Console(), 16, "accuracy") as bar:
        bar.on_train_begin(None, state, None)
        state.global_step += 1
        bar.on_log(None, state, None, {"loss": 10.1234})
        bar.on_step_end(None, state, None)
    shown = [frame for frame in frames(seen) if frame.startswith("training")]
    assert shown
    assert all(frame.rstrip().endswith(" left") for frame in shown)
    assert "98766/99999 loss 10.123" in shown[-1]
