"""`deltaw resize`: an adapter at a lower rank."""

from typing import Annotated

import typer

from deltaw.cli.adapters import (
    Base,
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
    base: Base = None,
) -> None:
    """Cut an adapter to a rank, or to the rank that keeps a share of ΔW in every layer.

    One of DoRA needs --base.
    """
    folder = new_folder(out)
    announce_loading()
    from deltaw.combine import StoredBase, check_portable, resize

    state = read_adapter(adapter)
    if portable:
        check_portable([state])
    weights = None if base is None else StoredBase(base)
    made = resize(state, rank=rank, energy=energy, base=weights)
    show(made.kept)
    write_adapter(made.state, folder, portable)
