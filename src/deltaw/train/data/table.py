"""From a path or a hub name to tables of rows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import DataError
from deltaw.train.data.columnar import read_columnar
from deltaw.train.data.decode import UTF8, decode, load, physical_lines
from deltaw.train.data.delimited import read_delimited
from deltaw.train.data.folder import ENDINGS, find_parts
from deltaw.train.data.hub import is_hub_name, read_hub
from deltaw.train.data.jsonrows import read_json, read_jsonl
from deltaw.train.data.prose import read_prose
from deltaw.train.data.rows import PATH_LIMIT, Row, Skip, Table
from deltaw.train.escape import printable


@dataclass(frozen=True, slots=True)
class Splits:
    """The parts of a data set; `notes` says what was decided while finding them."""

    train: Table
    validation: Table | None = None
    test: Table | None = None
    notes: tuple[str, ...] = ()


def read_rows(path: str | Path, *, encoding: str = UTF8, prose: bool = False) -> Table:
    """Read one csv, tsv, json, jsonl, parquet or arrow file, exactly as it is.

    A .txt file is read as tsv when there is a tab inside its first line; with `prose` any other
    is read as documents. Raises `DataError` naming the file, every bad line (the first 20) and the
    fix.
    """
    path = Path(path)
    file, ending = str(path), path.suffix.lower()
    shown = printable(file, PATH_LIMIT)
    data = load(path)
    if ending not in ENDINGS:
        raise DataError(
            f"{shown}: cannot read {printable(ending) or 'a file without an ending'}\n"
            "Fix: save it as .csv, .tsv, .json, .jsonl, .parquet or .arrow (a spreadsheet: CSV "
            "UTF-8)."
        )
    skipped: list[Skip] = []
    if ending in (".parquet", ".arrow"):
        columns, rows = read_columnar(data, file, ending)
    else:
        columns, rows, skipped = _read_text(decode(data, file, encoding), file, ending, prose)
    if not rows:
        raise DataError(f"{shown}: no rows below the column names\nFix: give a file with rows.")
    digest = hashlib.sha256(data).hexdigest()
    return Table(file, columns, tuple(rows), tuple(skipped), digest)


def _read_text(
    text: str, file: str, ending: str, prose: bool
) -> tuple[tuple[str, ...], list[Row], list[Skip]]:
    if ending == ".jsonl":
        return *read_jsonl(text, file), []
    if ending == ".json":
        return *read_json(text, file), []
    if ending == ".txt" and "\t" not in next(iter(physical_lines(text))).strip():
        if prose:
            return *read_prose(text, file), []
        raise DataError(
            f"{printable(file, PATH_LIMIT)}: a .txt file without tabs has no columns\n"
            "Fix: save it as .csv with the columns text and label."
        )
    return read_delimited(text, file, "," if ending == ".csv" else "\t")


def read_data(data: str | Path, *, encoding: str = UTF8, prose: bool = False) -> Splits:
    """Read a file (all of it is training data), a folder of parts, or a hub data set.

    A name is looked up on the hub only when no such path exists and it could not be a file's.
    `prose` is as in `read_rows`.
    Problems of all files of a folder are raised together as one `DataError`.
    """
    path = Path(data)
    if path.is_dir():
        return _read_folder(path, encoding, prose)
    if not path.exists() and path.suffix.lower() not in ENDINGS and is_hub_name(str(data)):
        parts = read_hub(str(data))
        train = parts["train"]
        assert train is not None
        return Splits(train, parts["validation"], parts["test"])
    return Splits(read_rows(path, encoding=encoding, prose=prose))


def _read_folder(folder: Path, encoding: str, prose: bool) -> Splits:
    found = find_parts(folder)
    tables: list[Table | None] = []
    errors: list[str] = []
    for path in (found.train, found.validation, found.test):
        try:
            read = None if path is None else read_rows(path, encoding=encoding, prose=prose)
            tables.append(read)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    train, validation, test = tables
    assert train is not None
    return Splits(train, validation, test, found.notes)
