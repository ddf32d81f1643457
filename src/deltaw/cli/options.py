"""Options that several commands share."""

import re
import sys
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder that `deltaw train` wrote.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Where the base model is now, if it has moved.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
NoMerge = Annotated[
    bool, typer.Option("--no-merge", help="Keep the adapter beside the weights while computing.")
]


NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")


def announce_loading() -> None:
    """Say on a terminal why nothing happens for some seconds."""
    if sys.stderr.isatty():
        print("Loading torch and transformers ...", file=sys.stderr, flush=True)


def targets(values: list[str] | None) -> str | list[str] | None:
    """Return `--targets` as PEFT means it: names, one regular expression, or "all-linear"."""
    if not values:
        return None
    if len(values) == 1 and (values[0] == "all-linear" or not NAMES.fullmatch(values[0])):
        return values[0]
    return [name for value in values for name in value.split(",")]
