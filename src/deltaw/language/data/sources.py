"""What `a.jsonl,owner/set,name#500` means: data sets by path, by hub name, or by their entry."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import DataError, printable, raise_all
from deltaw.language.data.info import FILE, Entry, entry, read_info
from deltaw.language.data.schema import Tags
from deltaw.train.data.folder import ENDINGS
from deltaw.train.data.hub import is_hub_name

LIMITED = re.compile(r"(?P<name>.+)#(?P<limit>[0-9]+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """One data set as it was asked for, and where it is."""

    name: str
    entry: Entry
    limit: int | None = None


def resolve(
    asked: str | Sequence[str],
    *,
    dataset_dir: Path | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Tags | None = None,
) -> tuple[Source, ...]:
    """Return the data sets of a list, or of a text with commas between their names.

    A name is that of an entry in the dataset_info.json of `dataset_dir`, a path (there, or from
    the working directory), or a hub name; `#500` behind it asks for 500 samples. `columns` and
    `tags` are for those that have no entry. Raises `DataError` listing all names that lead nowhere
    and all entries that make no sense.
    """
    names = _names(asked)
    entries = _entries(dataset_dir)
    found, errors, unknown = [], [], []
    for name in names:
        matched = None if Path(name).exists() else LIMITED.fullmatch(name)
        plain = matched["name"] if matched else name
        limit = int(matched["limit"]) if matched else None
        if limit == 0:
            unknown.append(f'"{printable(name)}" asks for no samples')
        elif dataset_dir is not None and plain in entries:
            try:
                found.append(Source(name, entry(plain, entries[plain], dataset_dir), limit))
            except DataError as error:
                errors.append(str(error))
        elif (place := _place(plain, dataset_dir)) is not None:
            location, hub = place
            found.append(Source(name, Entry(location, hub, columns, tags or Tags()), limit))
        else:
            near = difflib.get_close_matches(plain, entries, n=1)
            hint = f'; did you mean "{printable(near[0])}"?' if near else ""
            unknown.append(f'"{printable(plain, 300)}": no such file or folder{hint}')
    if unknown:
        within = f", a name of {FILE}" if entries else ""
        try:
            raise_all(
                DataError,
                "data sets that cannot be found",
                unknown,
                f"give a path{within}, or a hub data set as owner/name.",
            )
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return tuple(found)


def _names(asked: str | Sequence[str]) -> list[str]:
    if isinstance(asked, str):
        asked = [asked] if Path(asked).exists() else asked.split(",")
    names = [name.strip() for name in asked if name.strip()]
    if not names:
        raise DataError("no data set is named\nFix: give a file, a folder or a hub name.")
    return names


def _entries(dataset_dir: Path | None) -> Mapping[str, Any]:
    if dataset_dir is None or not (dataset_dir / FILE).is_file():
        return {}
    return read_info(dataset_dir)


def _place(name: str, dataset_dir: Path | None) -> tuple[str, bool] | None:
    """Return the location of a data set and whether it is on the hub, or None."""
    for path in (Path(name), *((dataset_dir / name,) if dataset_dir else ())):
        if path.exists():
            return str(path), False
    if Path(name).suffix.lower() not in ENDINGS and is_hub_name(name):
        return name, True
    return None
