"""Read parquet and Arrow files through pyarrow."""

import io
from typing import Any

from deltaw.errors import DataError, raise_all
from deltaw.train.data.header import name_problems
from deltaw.train.data.rows import PATH_LIMIT, Opaque, Row, Value, place
from deltaw.train.escape import printable

ARROW = b"ARROW1"
"""What an Arrow file begins with, and a stream of its batches, as datasets keeps them, does not."""


def read_columnar(data: bytes, file: str, ending: str) -> tuple[tuple[str, ...], list[Row]]:
    """Return columns and rows; a row's line is its number in the file, from 1."""
    import pyarrow

    shown = printable(file, PATH_LIMIT)
    try:
        table = _table(data, ending)
        columns = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{shown}: not a readable {ending[1:]} file: {printable(str(error), 200)}\n"
            "Fix: write it again, or give csv, tsv, json or jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: text that is not valid UTF-8\nFix: write it again.") from error
    names = tuple(table.column_names)
    raise_all(
        DataError,
        f"{place(file, 1)}: the column names cannot be used",
        name_problems(names),
        "give every column a name of its own.",
    )
    rows = zip(*columns, strict=True)
    return names, [
        Row(file, number, tuple(plain_value(value) for value in values))
        for number, values in enumerate(rows, 1)
    ]


def _table(data: bytes, ending: str) -> Any:
    from pyarrow import ipc, parquet

    if ending == ".parquet":
        # One column at a time, and not `read_table`, which folds columns of one name.
        return parquet.ParquetFile(io.BytesIO(data)).read()
    opened = ipc.open_file if data.startswith(ARROW) else ipc.open_stream
    return opened(data).read_all()


def plain_value(value: Any) -> Value:
    """Return `value`, or `Opaque` when it is neither text, number, truth value nor null.

    Arrow gives all objects of a column the keys of every other; those of null are taken out again.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    return Opaque(f"a value of type {type(value).__name__}", _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value
