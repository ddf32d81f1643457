"""What the commands that make one adapter from others share: reading, showing, writing."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.errors import RunError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaw.combine import Kept
    from deltaw.state import State

Out = Annotated[str, typer.Option("--out", "-o", help="New folder for the adapter.")]
Rank = Annotated[int | None, typer.Option("--rank", "--r", help="Rank of every layer.")]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Share of Σσ² that every layer keeps, in (0, 1].")
]
Portable = Annotated[
    bool, typer.Option("--portable", help="One rank, and alpha = r, in all layers (vLLM).")
]
Base = Annotated[
    str | None, typer.Option("--base", help="Folder or file of the base, which DoRA needs.")
]
Exact = Annotated[
    bool, typer.Option("--exact", help="A full SVD of large matrices instead of a random sketch.")
]


def new_folder(out: str) -> Path:
    """Return the folder to write to, which must not be there."""
    folder = Path(out)
    if folder.exists():
        raise RunError(f"{printable(out, 300)} exists already. Fix: give a new folder.")
    return folder


def read_adapter(path: str) -> "State":
    """Read an adapter in any format."""
    from deltaw.formats import sniff

    return sniff(Path(path)).read(Path(path))


def nameless(state: "State") -> "State":
    """Return the adapter without the name of its base."""
    from dataclasses import replace

    return replace(state, config=replace(state.config, base_model_name_or_path=None))


def show(kept: "Sequence[Kept]") -> None:
    """Print what every layer kept."""
    from deltaw.analysis.kept import text

    for line in text(kept).splitlines():
        print(printable(line, 2000))


def write_adapter(state: "State", folder: Path, portable: bool) -> None:
    """Write the adapter in PEFT's format, and say what it is and what to type next."""
    from deltaw import combine
    from deltaw.formats import format_of
    from deltaw.train.console import Console

    if portable:
        state = combine.portable(state)
    format_of("peft").write(state, folder)
    config, console = state.config, Console()
    numbers = sum(t.numel() for layer in state.layers.values() for t in layer.tensors.values())
    ranks = f"r={config.r}" + (" and others" if config.rank_pattern else "")
    where = printable(str(folder), 300)
    console.field("written", f"{where}: {ranks}, {numbers:,} parameters")
    command = f"deltaw inspect {shlex.quote(str(folder))}"
    console.field("next", printable(command, 300), whole=True)
