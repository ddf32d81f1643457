"""The command line: `deltaw COMMAND ...`; a command imports what it needs only when it runs."""

import os
import sys


def main() -> None:
    """Run the command line; a known error becomes one message and exit code 1, a signal 128 + n."""
    from deltaw.cli.app import app
    from deltaw.errors import DeltawError
    from deltaw.train.interrupt import Stopped

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except DeltawError as error:
        _fail(f"error: {error}", 1)
    except Stopped as stop:
        _fail(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _fail("Stopped.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
