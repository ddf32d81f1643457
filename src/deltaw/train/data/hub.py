"""Read a data set of the Hugging Face hub through `datasets`."""

import hashlib
import re
from typing import Any

from deltaw.errors import DataError
from deltaw.train.data.columnar import plain_value
from deltaw.train.data.folder import PARTS
from deltaw.train.data.rows import Row, Table, Value
from deltaw.train.escape import printable

# The owner is required: `load_dataset("csv")` would read every csv file of the working directory.
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def is_hub_name(name: str) -> bool:
    """Does `name` look like `owner/data-set` or `owner/data-set:configuration`?"""
    return NAME.fullmatch(name) is not None


def read_hub(
    name: str, *, split: str | None = None, folder: str | None = None
) -> dict[str, Table | None]:
    """Return the tables train, validation and test of a hub data set (None where it has none).

    `split` names the one part that is wanted, which becomes the training table; `folder` is the
    folder of the repository to read. Class numbers become class names. A row's line is its number
    in its part, from 1. Raises `DataError` when the hub or its cache does not have the data set,
    or it has no training part.
    """
    import datasets

    path, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(path, configuration or None, data_dir=folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{printable(name)}: no such file or folder, and the hub gives no data set of "
            f"this name: {printable(str(error), 300)}\n"
            "Fix: check the path; for a hub data set check the name and the connection."
        ) from error
    wanted = {"train": (split,)} if split else PARTS
    parts = {
        part: next((word for word in wanted.get(part, ()) if word in found), None) for part in PARTS
    }
    if parts["train"] is None:
        lacks = f'no part "{printable(split)}"' if split else "no training part"
        raise DataError(
            f"{printable(name)}: {lacks}; the data set has "
            f"{', '.join(printable(str(part)) for part in found)}\n"
            "Fix: download the part you want and give its file."
        )
    return {
        part: None if word is None else _table(found[word], f"{name}/{word}")
        for part, word in parts.items()
    }


def _table(part: Any, file: str) -> Table:
    columns = tuple(part.column_names)
    names = {
        name: feature.names
        for name, feature in part.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    digest = hashlib.sha256(repr(columns).encode())
    rows = []
    for number, record in enumerate(part, 1):
        values = tuple(_value(record[name], names.get(name)) for name in columns)
        digest.update(repr(values).encode())
        rows.append(Row(file, number, values))
    return Table(file, columns, tuple(rows), (), digest.hexdigest())


def _value(value: Any, names: list[str] | None) -> Value:
    if names is None or value is None:
        return plain_value(value)
    # The hub's test parts without labels hold -1.
    return names[value] if value >= 0 else None
