"""What a run says: to the person in the terminal, and all of it to `log.jsonl`."""

import json
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from deltaw.train.escape import printable

INDENT = " " * 10
NARROWEST = 20


class Console:
    """Prints lines, unless `silent`, and records events; before `log_to` they wait in memory."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self._path: Path | None = None
        self._waiting: list[str] = []

    def log_to(self, path: Path) -> None:
        """Append all events, those so far included, to `path` from now on."""
        self._path = path
        waiting, self._waiting = self._waiting, []
        self._append(waiting)

    def line(self, text: str = "") -> None:
        """Print one or more lines that are known to be safe, and record them."""
        self._print(text)
        self.record("text", text=text)

    def field(self, name: str, text: str, *, whole: bool = False) -> None:
        """Print `text` behind a short name in a column of its own; further lines are indented.

        A terminal gets it in lines that fit, or `whole`, as commands to copy must be.
        """
        if not self.silent:
            fits = sys.stdout.isatty() and not whole
            width = shutil.get_terminal_size().columns if fits else None
            self._print(_column(name, text, width))
        self.record("text", text=_column(name, text, None))

    def record(self, event: str, **values: Any) -> None:
        """Write one event to the log only."""
        self._append([json.dumps({"time": round(time.time(), 3), "event": event, **values})])

    def _print(self, text: str) -> None:
        """Print, and be silent once that is not possible any more, as on a full disk."""
        if self.silent:
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.silent = True
            reason = printable(str(error))
            said = f"The output cannot be written, and work goes on without: {reason}"
            print(said, file=sys.stderr)

    def _append(self, lines: list[str]) -> None:
        if self._path is None:
            self._waiting += lines
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            print(f"log.jsonl cannot be written: {printable(str(error))}", file=sys.stderr)


def _column(name: str, text: str, width: int | None) -> str:
    """Return the lines of `text` behind `name`; between words broken where `width` ends."""
    lines = text.split("\n")
    if width is not None:
        room = max(width - len(INDENT), NARROWEST)
        lines = [part for line in lines for part in _broken(line, room)]
    first, *rest = lines
    return "\n".join([f"{name:<{len(INDENT) - 1}} {first}", *(INDENT + more for more in rest)])


def _broken(line: str, room: int) -> list[str]:
    return textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) or [""]
