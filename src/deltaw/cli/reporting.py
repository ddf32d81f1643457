"""What a command prints when it fails, and its exit code."""

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from deltaw.errors import DeltawError
from deltaw.train.escape import printable
from deltaw.train.interrupt import Interrupt, Stopped

LONGEST = 4000


def reported(command: Callable[[], object]) -> None:
    """Call what may raise; a known error becomes one message and exit code 1, a signal 128 + n."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr, whatever the locale
    try:
        with Interrupt("Stopped."), warnings.catch_warnings():
            warnings.showwarning = _warn
            command()
    except DeltawError as error:
        _fail(f"error: {error}", 1)
    except Stopped as stop:
        _fail(str(stop), stop.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"error: {printable(str(error.filename), 300)}: {_reason(error)}", 1)


def _fail(message: str, code: int) -> NoReturn:
    lines = [printable(line, LONGEST) for line in message.split("\n")]
    print("\n".join(lines) + "\n", end="", file=sys.stderr)  # at once, beside other processes
    sys.exit(code)


def _reason(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    fix = "\nFix: check the permissions, or give another path."
    return reason + fix * isinstance(error, PermissionError)


def _warn(message: Warning | str, *place: object) -> None:
    """Show a warning as one line, without the place in the code that Python would add."""
    if os.environ.get("RANK", "0") != "0":
        return
    text = " ".join(str(message).split())
    print(f"warning: {printable(text, LONGEST)}", file=sys.stderr)
