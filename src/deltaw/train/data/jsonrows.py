"""Read JSON lines and JSON arrays of objects, keeping the line every object begins on."""

import bisect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deltaw.errors import DataError, raise_all
from deltaw.train.data.decode import physical_lines
from deltaw.train.data.names import NESTED, plain
from deltaw.train.data.rows import PATH_LIMIT, Opaque, Row, Value, place
from deltaw.train.escape import printable

BLANK = re.compile(r"[ \t\r\n]*")
LINE_END = re.compile(r"\r\n|\r|\n")
LINES = 'write one object per line, {"COLUMN": "value", ...}, its texts in double quotes'
ARRAY = "make the file an array of objects: [{...}, {...}]"
KINDS: dict[type, str] = {list: "a list", dict: "an object"}


def read_json(text: str, file: str) -> tuple[tuple[str, ...], list[Row]]:
    """Read an array of objects, or JSON lines when the text does not begin with `[`.

    Objects of an array that share a line are told apart by their number.
    """
    if text.lstrip()[0] == "[":
        columns, rows = _rows(_array(text), file, f"{ARRAY}.")
        if len({row.line for row in rows}) < len(rows):
            rows = [replace(row, line=number) for number, row in enumerate(rows, 1)]
        return columns, rows
    columns, rows = _rows(_lines(text), file, f"{ARRAY}.")
    if len(rows) == 1 and _holds_rows(columns, rows[0]):
        raise DataError(
            f"{printable(file, PATH_LIMIT)}: one object and no table; "
            f"{_described(columns, rows[0])}\nFix: {ARRAY}, one for each row."
        )
    return columns, rows


def _holds_rows(columns: tuple[str, ...], row: Row) -> bool:
    """Does an object hold lists or objects where a row of chat data would not?"""
    return any(
        isinstance(value, Opaque) and plain(name) not in NESTED
        for name, value in zip(columns, row.values, strict=True)
    )


def read_jsonl(text: str, file: str) -> tuple[tuple[str, ...], list[Row]]:
    """Read one object per line; blank lines are no rows."""
    return _rows(_lines(text), file, f"{LINES}.")


class _Repeated(ValueError):
    """A key that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise _Repeated(f'the key "{printable(key)}" occurs twice in one object')
        unique[key] = value
    return unique


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
# What the decoder raises on bad text: ValueError covers syntax, repeated keys and huge numbers.
Found = Iterator[tuple[int, Any | ValueError | RecursionError]]


def _lines(text: str) -> Found:
    for number, line in enumerate(physical_lines(text), 1):
        if not line.strip():
            continue
        try:
            yield number, DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            yield number, error


def _array(text: str) -> Found:
    """Walk the array element by element; stop at the first place that cannot be read."""
    starts = [0, *(match.end() for match in LINE_END.finditer(text))]
    at = _after_blank(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line = bisect.bisect_right(starts, at)
        try:
            value, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield bisect.bisect_right(starts, error.pos), error
            return
        except (ValueError, RecursionError) as error:
            yield line, error
            return
        yield line, value
        at = _after_blank(text, at)
        if text[at : at + 1] == ",":
            at = _after_blank(text, at + 1)
        elif text[at : at + 1] != "]":
            line = bisect.bisect_right(starts, at)
            yield line, ValueError("expected a comma or the end of the array")
            return
    rest = _after_blank(text, at + 1)
    if rest < len(text):
        yield bisect.bisect_right(starts, rest), ValueError("text after the end of the array")


def _after_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    return match.end() if match else at


def _rows(found: Found, file: str, fix: str) -> tuple[tuple[str, ...], list[Row]]:
    problems, objects = [], []
    for line, value in found:
        if isinstance(value, json.JSONDecodeError):
            problems.append(
                f"{place(file, line)}: invalid JSON: {value.msg} (column {value.colno})"
            )
        elif isinstance(value, RecursionError):
            problems.append(f"{place(file, line)}: nested too deeply")
        elif isinstance(value, ValueError):
            problems.append(f"{place(file, line)}: {value}")
        elif not isinstance(value, dict):
            problems.append(
                f"{place(file, line)}: not an object: {printable(json.dumps(value), 40)}"
            )
        elif half := _half_surrogates(value):
            problems.append(f"{place(file, line)}: {half} holds half of a surrogate pair")
        else:
            objects.append((line, value))
    shown = printable(file, PATH_LIMIT)
    raise_all(DataError, f"{shown}: not a table of JSON objects", problems, fix)
    columns = tuple(dict.fromkeys(key for _, value in objects for key in value))
    rows = [
        Row(file, line, tuple(_plain(value.get(name)) for name in columns))
        for line, value in objects
    ]
    return columns, rows


def _plain(value: Any) -> Value:
    kind = KINDS.get(type(value))
    return value if kind is None else Opaque(kind, value)


def _described(columns: tuple[str, ...], row: Row) -> str:
    return ", ".join(
        f'"{printable(name)}" holds {value.kind}'
        for name, value in zip(columns, row.values, strict=True)
        if isinstance(value, Opaque)
    )


def _half_surrogates(value: dict[str, Any]) -> str:
    """Return the first key whose name or text cannot be written as UTF-8, or nothing."""
    for key, item in value.items():
        try:
            key.encode()
            if isinstance(item, str):
                item.encode()
        except UnicodeEncodeError:
            return printable(repr(key))
    return ""
