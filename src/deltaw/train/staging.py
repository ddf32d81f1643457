"""Writing that is either there in full or not at all: a temporary name, then a rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deltaw.errors import RunError
from deltaw.train.escape import printable

PARTIAL = ".partial-"
DOOMED = ".removing-"
READY = ".ready"


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the block ends well, and vanishes otherwise.

    `final` must not exist. A process killed inside the block leaves a folder named `.partial-*`,
    which `sweep` removes.

    Raises:
        RunError: if something cannot be written, with the system's reason.
    """
    partial = final.with_name(PARTIAL + final.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        raise cannot_write(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        RunError: if it cannot be written; a file that was there before is kept.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def staged_into(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of `folder` when the block ends well."""
    ready = folder / READY
    with staged(ready) as partial:
        yield partial
    try:
        for file in sorted(ready.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(ready, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder such that an interruption never leaves half of it under its own name."""
    doomed = folder.with_name(DOOMED + folder.name)
    if folder.exists():
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what an interrupted `staged`, `write_text` or `remove` left in `folder`."""
    for path in folder.iterdir():
        if path.name.startswith((PARTIAL, DOOMED)) or path.name == READY:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> RunError:
    """Return the error that says why `path` cannot be written and that nothing was lost."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunError(
        f"{printable(str(path), 300)} cannot be written: {printable(reason, 200)}.\n"
        "Nothing half-written was left, and what was there before is kept.\n"
        "Fix: free some space or check the permissions, or choose another place."
    )
