"""Where the files of an adapter are: in a folder, or on the hub."""

import os
from collections.abc import Sequence
from pathlib import Path

from deltaw.errors import FormatError, printable
from deltaw.formats._files import shown


def adapter_folder(
    model_id: str | Path,
    names: Sequence[str],
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder with the files `names`, fetched from the hub unless it is on the disk.

    Raises:
        FormatError: if there is neither such a folder nor such an adapter on the hub.
    """
    folder = Path(model_id, subfolder or "")
    if os.path.exists(folder):
        return folder
    from transformers.utils import cached_file

    try:
        found = [
            cached_file(
                str(model_id),
                name,
                subfolder=subfolder or "",
                revision=revision,
                cache_dir=cache_dir,
                token=token,
            )
            for name in names
        ]
    except OSError as problem:
        raise FormatError(
            f"There is no folder {shown(folder)}, and the hub has no adapter of that name: "
            f"{printable(str(problem), 300)}"
        ) from problem
    return Path(found[0]).parent
