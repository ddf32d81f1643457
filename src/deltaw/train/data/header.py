"""Is the first line of a csv or tsv file a usable header, or is it already data?"""

import re
from collections.abc import Sequence

from deltaw.errors import DataError, raise_all
from deltaw.train.data.names import KNOWN, plain
from deltaw.train.data.rows import Row, place
from deltaw.train.escape import printable

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def check_header(columns: Sequence[str], rows: Sequence[Row], file: str) -> None:
    """Raise `DataError` when names are missing or doubled, or when the line looks like data.

    A line with a well-known name (text, label, ...) is a header. Without one, a number, a sentence
    or a value that comes back at least twice in its own column says that there is none.
    """
    where = place(file, 1)
    if not any(plain(name) in KNOWN for name in columns):
        raise_all(
            DataError,
            f"{where}: the first line looks like data, not like column names",
            _signs_of_data(columns, rows),
            f"put a line with {len(columns)} column names first, such as text and label.",
        )
    raise_all(
        DataError,
        f"{where}: the column names cannot be used",
        name_problems(columns),
        "give every column a name of its own (pandas: `to_csv(..., index=False)`).",
    )


def name_problems(columns: Sequence[str]) -> list[str]:
    """Return one sentence for each missing and each repeated column name."""
    problems = []
    places: dict[str, int] = {}
    for index, name in enumerate(columns):
        first = places.setdefault(name, index)
        if not name.strip():
            problems.append(f"column {index + 1} has no name")
        elif first < index:
            problems.append(
                f"columns {first + 1} and {index + 1} are both named {printable(name)!r}"
            )
    return problems


def _signs_of_data(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    signs = []
    for index, name in enumerate(columns):
        repeats = [row.line for row in rows if row.values[index] == name]
        if NUMBER.fullmatch(name):
            signs.append(f"column {index + 1} would be named {printable(name)}, a number")
        elif len(name.split()) > 3 and (len(name) > 40 or name.rstrip().endswith((".", "!", "?"))):
            signs.append(f'column {index + 1} would be named "{printable(name)}", a sentence')
        elif name.strip() and len(repeats) > 1:
            signs.append(
                f'column {index + 1} would be named "{printable(name)}", '
                f"which comes back as a value {len(repeats)} times, first on line {repeats[0]}"
            )
    return signs
