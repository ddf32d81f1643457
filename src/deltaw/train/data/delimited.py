"""Read csv and tsv.

csv is comma-separated with quotes, as RFC 4180 has it. In tsv a quote character is usually just a
character (GLUE is full of them), but csv writers quote there too. The rule that decides:

- all lines have the same number of tabs: quotes are quoting only if every field that holds one is
  wrapped in quotes with its inner quotes doubled, and the wrapping was either needed (there are
  inner quotes) or done everywhere but on numbers;
- lines differ in their number of tabs: quotes are quoting if, read so, every row has equally many
  values.

Otherwise every quote is kept as it is.
"""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deltaw.errors import DataError, raise_all
from deltaw.train.data.decode import physical_lines
from deltaw.train.data.header import NUMBER, check_header
from deltaw.train.data.rows import PATH_LIMIT, Row, Skip, place
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable

LARGEST_FIELD = min(sys.maxsize, 2**31 - 1)
WRAPPED = re.compile(r'"([^"]|"")*"')
Records = list[tuple[int, list[str]]]


def read_delimited(
    text: str, file: str, delimiter: str
) -> tuple[tuple[str, ...], list[Row], list[Skip]]:
    """Return columns, rows and skipped rows; `delimiter` is a comma or a tab.

    Empty lines are no rows, nor lines of blanks where there are several columns. Raises
    `DataError` listing all ragged rows, or an unclosed quote.
    """
    quoted = delimiter == "," or _quotes_are_quoting(text)
    try:
        records = _records(text, delimiter, quoted)
    except _Malformed as error:
        raise DataError(
            f"{place(file, error.line)}: {error.reason} in the row that begins here\n"
            "Fix: close every quote, and double the quotes inside a quoted value."
        ) from error
    (_, names), *body = records
    columns = tuple(name.strip() for name in names)
    _refuse_other_separator(columns, delimiter, file)
    ragged = [
        f"{place(file, line)}: {counted(len(values), 'value')}"
        for line, values in body
        if len(values) != len(columns)
    ]
    rows = [Row(file, line, tuple(values)) for line, values in body if len(values) == len(columns)]
    check_header(columns, rows, file)
    raise_all(
        DataError,
        f"{printable(file, PATH_LIMIT)}: rows that do not have the header's {len(columns)} values",
        ragged,
        'put "quotes" around values that contain a comma or a line break.'
        if delimiter == ","
        else "a row needs one tab between two values and none inside a value.",
    )
    header = tuple(names) if len(names) > 1 else None
    skipped = [Skip(file, row.line, "repeats the header") for row in rows if row.values == header]
    return columns, [row for row in rows if row.values != header], skipped


class _Malformed(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def _records(text: str, delimiter: str, quoted: bool) -> Records:
    """Return (first line, values) for every row that is not blank."""
    reader = csv.reader(
        physical_lines(text),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    records: Records = []
    line = 1
    with _large_fields():
        try:
            for values in reader:
                width = len(records[0][1]) if records else 0
                if len(values) > 1 or (values and (width == 1 or values[0].strip())):
                    records.append((line, values))
                line = reader.line_num + 1
        except csv.Error as error:
            raise _Malformed(line, str(error)) from error
    return records


@contextmanager
def _large_fields() -> Iterator[None]:
    """Lift the csv module's limit on the length of a value, which is one for the whole process."""
    before = csv.field_size_limit(LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _quotes_are_quoting(text: str) -> bool:
    if '"' not in text:
        return False
    lines = [line.rstrip("\r\n") for line in physical_lines(text)]
    lines = [line for line in lines if line.strip()]
    if len({line.count("\t") for line in lines}) == 1:
        fields = [field for line in lines for field in line.split("\t")]
        wrapped = [field for field in fields if WRAPPED.fullmatch(field)]
        bare = [field for field in fields if not WRAPPED.fullmatch(field)]
        if any('"' in field for field in bare):
            return False
        needed = all('""' in field[1:-1] for field in wrapped)
        return needed or all(not field or NUMBER.fullmatch(field) for field in bare)
    try:
        records = _records(text, "\t", quoted=True)
    except _Malformed:
        return False
    return len({len(values) for _, values in records}) == 1


def _refuse_other_separator(columns: tuple[str, ...], delimiter: str, file: str) -> None:
    others = [other for other in ",;\t|" if other != delimiter and other in columns[0]]
    if len(columns) == 1 and others:
        raise DataError(
            f'{place(file, 1)}: one column only, "{printable(columns[0])}"; its values seem to be '
            f"separated by {printable(others[0])!r}\n"
            "Fix: save the file with commas as .csv, or with tabs as .tsv."
        )
