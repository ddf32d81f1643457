"""What a run says: to the person in the terminal, and all of it to `log.jsonl`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from deltaw.train.escape import printable


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
        if not self.silent:
            print(text, flush=True)
        self.record("text", text=text)

    def field(self, name: str, text: str) -> None:
        """Print `text` behind a short name in a column of its own; further lines are indented."""
        first, *rest = text.split("\n")
        self.line("\n".join([f"{name:<9} {first}", *(f"{'':<9} {more}" for more in rest)]))

    def record(self, event: str, **values: Any) -> None:
        """Write one event to the log only."""
        self._append([json.dumps({"time": round(time.time(), 3), "event": event, **values})])

    def _append(self, lines: list[str]) -> None:
        if self._path is None:
            self._waiting += lines
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            print(f"log.jsonl cannot be written: {printable(str(error))}", file=sys.stderr)
