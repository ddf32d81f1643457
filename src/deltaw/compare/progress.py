"""One display for all runs of a comparison: a bar in a terminal, a line for each run elsewhere."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as Terminal
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from deltaw.train.console import Console
from deltaw.train.escape import printable
from deltaw.train.progress import duration

TAIL = 8192
"""Bytes read from the end of a run's log."""
BESIDE = 60
"""Columns taken by what stands beside the names of the runs in progress."""


@dataclass
class Running:
    """Work in progress: its weight in the whole, and where its steps can be read."""

    weight: float
    steps: int = 0
    log: Path | None = None

    def step(self) -> int:
        """Return the last step that its log tells of."""
        if self.log is None:
            return 0
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "step":
                return min(int(event["step"]), self.steps)
        return 0


class Progress:
    """Shows how much of `total` is done, what is at work, and the time left."""

    def __init__(
        self, console: Console, word: str, count: int, total: float, ended: int, done: float
    ) -> None:
        self.console = console
        self.running: dict[str, Running] = {}
        self._count, self._ended = count, ended
        self._total, self._done = total, done
        self._began = {"": time.monotonic()}
        self._bar: Bar | None = None
        terminal = Terminal()
        if terminal.is_terminal and ended < count:
            self._bar = Bar(
                TextColumn(word),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[ended]} of {task.fields[count]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left {task.fields[now]}"),
                console=terminal,
                speed_estimate_period=3600.0,
            )
            self._task = self._bar.add_task(
                "", total=total, completed=done, ended=ended, count=count, now=""
            )
            self._bar.start()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, running: Running) -> None:
        """Take up what has been started."""
        self.running[name] = running
        self._began[name] = time.monotonic()

    def done(self, name: str, outcome: str) -> None:
        """Count what has ended, and say what came of it."""
        self._done += self.running.pop(name).weight
        self._ended += 1
        took = duration(time.monotonic() - self._began.pop(name))
        text = f"{self._ended}/{self._count} {printable(name, 200)}: {outcome} ({took})"
        if self._bar is None:
            self.console.line(text)
        else:
            self._bar.console.print(text, highlight=False, markup=False)
        self.show()

    def show(self) -> None:
        """Bring the bar up to date."""
        if self._bar is None:
            return
        at = self._done
        names = []
        for name, running in self.running.items():
            step = running.step()
            at += running.weight * step / running.steps if running.steps else 0.0
            names.append(f"{name} step {step}/{running.steps}" if running.steps else name)
        room = max(10, shutil.get_terminal_size().columns - BESIDE)
        now = printable("; ".join(names), room).replace("[", "\\[")
        self._bar.update(self._task, completed=at, ended=self._ended, now=now)
