"""The command line: `deltaw COMMAND ...`; a command imports what it needs only when it runs."""

import os

from deltaw.cli.reporting import reported


def main() -> None:
    """Run the command line; a known error becomes one message and exit code 1, a signal 128 + n."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def command() -> None:
        from deltaw.cli.app import app

        app()

    reported(command)
