"""From a data set to its tables: a file, a folder with or without parts, or a hub data set."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from deltaw.errors import DataError, printable, raise_all
from deltaw.language.data.detect import listed
from deltaw.language.data.info import Entry
from deltaw.train.data.decode import UTF8
from deltaw.train.data.folder import loose_files
from deltaw.train.data.hub import read_hub
from deltaw.train.data.rows import PATH_LIMIT, Row, Table
from deltaw.train.data.table import Splits, read_data, read_rows
from deltaw.train.data.wording import counted


def read_splits(entry: Entry, *, encoding: str = UTF8) -> Splits:
    """Return the parts of a data set.

    The files of a folder are parts when one is called train, validation, ...; otherwise, if they
    are of one format and have the same columns, all of them together are the training part.
    """
    path = Path(entry.location)
    if entry.hub:
        parts = read_hub(entry.location, split=entry.split, folder=entry.folder)
        train = parts["train"]
        assert train is not None
        return Splits(train, parts["validation"], parts["test"])
    if path.is_dir() and len(files := loose_files(path)) > 1:
        tables = [read_rows(file, encoding=encoding, prose=True) for file in files]
        note = f"{printable(path.name)}: {counted(len(files), 'file')} read as one data set"
        return Splits(_together(tables, str(path)), notes=(note,))
    return read_data(entry.location, encoding=encoding, prose=True)


def _together(tables: Sequence[Table], folder: str) -> Table:
    columns = tables[0].columns
    raise_all(
        DataError,
        f"{printable(folder, PATH_LIMIT)}: files with different columns in one folder",
        [
            f"{printable(Path(table.path).name)}: {listed(table.columns)}"
            for table in tables
            if {*table.columns} != {*tables[0].columns}
        ],
        f"give the files one by one, or the columns of the first to all: {listed(columns)}.",
    )
    rows = []
    for table in tables:
        places = [table.columns.index(name) for name in columns]
        rows += [Row(r.file, r.line, tuple(r.values[at] for at in places)) for r in table.rows]
    digest = hashlib.sha256("".join(table.sha256 for table in tables).encode()).hexdigest()
    skipped = tuple(skip for table in tables for skip in table.skipped)
    return Table(folder, columns, tuple(rows), skipped, digest)
