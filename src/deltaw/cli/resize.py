"""`deltaw resize`: an adapter at a lower rank."""

from typing import Annotated

import typer

from deltaw.cli.adapters import (
    Energy,
    Out,
    Portable,
    Rank,
    new_folder,
    read_adapter,
    show,
    write_adapter,
)
from deltaw.cli.options import announce_loading


def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or file of one.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    portable: Portable = False,
) -> None:
    """Cut an adapter to a rank, or to the rank that keeps a share of ΔW in every layer."""
    folder = new_folder(out)
    announce_loading()
    from deltaw.combine import resize

    made = resize(read_adapter(adapter), rank=rank, energy=energy)
    show(made.kept)
    write_adapter(made.state, folder, portable)
