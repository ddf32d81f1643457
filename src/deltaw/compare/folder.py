"""The folder of a comparison: who may write to it, and what is in it.

OUT/
  comparison.json   settings, every run that is done, and what follows from them
  table.md          the table
  report.html       the same with pictures, in one page
  running/          the runs in progress, each in a folder of its own
  .lock             held by the process that compares
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaw.compare.record import FILE
from deltaw.errors import RunError
from deltaw.train import staging
from deltaw.train.escape import printable
from deltaw.train.locking import LOCK, lock

RUNNING = "running"
TABLE = "table.md"
REPORT = "report.html"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create and lock the folder of a comparison; leave no empty one behind.

    Raises:
        RunError: if it holds other files, cannot be written, or another process has it.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = (LOCK, RUNNING, staging.PARTIAL + FILE)
        found = sorted(path.name for path in folder.iterdir() if path.name not in own)
    except OSError as error:
        raise staging.cannot_write(folder, error) from error
    if found and FILE not in found:
        raise RunError(
            f"{printable(str(folder), 300)} holds other files ({printable(', '.join(found[:3]))}) "
            "and no comparison.\nFix: choose an empty or new folder with --output."
        )
    with lock(folder):
        try:
            yield
        finally:
            if new and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def clear(folder: Path) -> None:
    """Delete the comparison in a folder and nothing else."""
    for name in (FILE, TABLE, REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / RUNNING, ignore_errors=True)
