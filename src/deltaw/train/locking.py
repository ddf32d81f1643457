"""A folder that only one process writes to at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deltaw.errors import RunError
from deltaw.train import staging
from deltaw.train.escape import printable

LOCK = ".lock"


@contextmanager
def held(folder: Path, refuse: Callable[[], None]) -> Iterator[None]:
    """Create and lock a folder; what was created for it alone is gone in the end if still empty.

    `refuse` raises if the folder is not to be used; nothing in it was touched then.

    Raises:
        RunError: if it cannot be written or another process has it; and what `refuse` raises.
    """
    try:
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        refuse()
        unlocked = not (folder / LOCK).exists()
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise staging.cannot_write(folder, error) from error
    with file:
        _take(file, folder)
        try:
            yield
        finally:
            if unlocked and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                if created:
                    folder.rmdir()


def _take(file: IO[str], folder: Path) -> None:
    """Lock an open file and write into it who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = printable(file.read().strip()) or "unknown"
        raise RunError(
            f"Another process (id {holder}) writes to {printable(str(folder), 300)}.\n"
            "Fix: wait for it, stop it, or choose another folder with --output."
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
