"""The folder of a comparison: who may write to it, and what is in it.

OUT/
  comparison.json   settings, every run that is done, and what follows from them
  table.md          the table
  report.html       the same with pictures, in one page
  running/          the runs in progress, each in a folder of its own
  .lock             held by the process that compares
"""

import shutil
from pathlib import Path

from deltaw.compare.record import FILE
from deltaw.errors import RunError
from deltaw.train import staging
from deltaw.train.escape import printable
from deltaw.train.locking import LOCK

RUNNING = "running"
TABLE = "table.md"
REPORT = "report.html"


def refuse_foreign(folder: Path) -> None:
    """Raise `RunError` if a folder holds other files and no comparison."""
    own = (LOCK, RUNNING, staging.PARTIAL + FILE)
    found = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if found and FILE not in found:
        raise RunError(
            f"{printable(str(folder), 300)} holds other files ({printable(', '.join(found[:3]))}) "
            "and no comparison.\nFix: choose an empty or new folder with --output."
        )


def clear(folder: Path) -> None:
    """Delete the comparison in a folder and nothing else."""
    for name in (FILE, TABLE, REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / RUNNING, ignore_errors=True)
