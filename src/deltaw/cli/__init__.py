"""The command line: `deltaw COMMAND ...`; a command imports what it needs only when it runs."""

import os

from deltaw.cli.reporting import reported
from deltaw.errors import ConfigError

PACKAGES = (
    "accelerate",
    "datasets",
    "jinja2",
    "numpy",
    "pyarrow",
    "pydantic",
    "rich",
    "sacrebleu",
    "transformers",
    "trl",
    "typer",
    "yaml",
)
"""What the extra `train` brings along."""


def main() -> None:
    """Run the command line; a known error becomes one message and exit code 1, a signal 128 + n."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def command() -> None:
        try:
            from deltaw.cli.app import app

            app()
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in PACKAGES:
                raise
            raise ConfigError(
                f"The command line needs the trainer, and {package} is not installed.\n"
                "Fix: pip install 'deltaw[train]'"
            ) from error

    reported(command)
