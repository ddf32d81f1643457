"""A folder that only one process writes to at a time."""

import fcntl
import os
from pathlib import Path
from typing import IO

from deltaw.errors import RunError
from deltaw.train import staging
from deltaw.train.escape import printable

LOCK = ".lock"


def lock(folder: Path) -> IO[str]:
    """Take the lock of an existing folder; it is free again when the file is closed.

    Raises:
        RunError: if another process has it, or it cannot be written.
    """
    try:
        held = (folder / LOCK).open("a+")
    except OSError as error:
        raise staging.cannot_write(folder, error) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.seek(0)
        holder = printable(held.read().strip()) or "unknown"
        held.close()
        raise RunError(
            f"Another process (id {holder}) writes to {printable(str(folder), 300)}.\n"
            "Fix: wait for it, stop it, or choose another folder with --output."
        ) from error
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held
