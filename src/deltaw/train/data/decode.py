"""Bytes of a file to text, exactly: what leaves a doubt is refused, with its place."""

import codecs
import io
from collections.abc import Iterable
from pathlib import Path

from deltaw.errors import DataError, raise_all
from deltaw.train.data.rows import PATH_LIMIT, place
from deltaw.train.escape import printable

UTF8 = "utf-8"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def load(path: Path) -> bytes:
    """Return the bytes of `path`; raise `DataError` when it is missing, unreadable or empty."""
    shown = printable(str(path), PATH_LIMIT)
    if not path.is_file():
        raise DataError(
            f"{shown}: no such file\n"
            "Fix: check the path; a data set of the hub is written owner/name."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error
    if not data:
        raise DataError(f"{shown}: the file is empty\nFix: give a file with at least a few rows.")
    return data


def decode(data: bytes, file: str, encoding: str = UTF8) -> str:
    """Return `data` as text without its byte order mark; line ends stay as they are.

    Raises `DataError` naming every line (the first 20 of them) that is not valid in `encoding` or
    holds a NUL byte.
    """
    shown = printable(file, PATH_LIMIT)
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # raises for what is no encoding of text, such as rot13
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{shown}: unknown encoding {printable(encoding)!r}\nFix: use utf-8, cp1252, ..."
        ) from error
    if name == UTF8:
        _refuse_wide(data, shown)
        _refuse_invalid(data, file)
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except UnicodeError as error:
        raise DataError(
            f"{shown}: not valid {name}: {printable(str(error), 200)}\n"
            "Fix: name the right encoding."
        ) from error
    raise_all(
        DataError,
        f"{shown}: text cannot hold NUL bytes; the file is damaged, binary or of another encoding",
        [
            f"{place(file, number)}: NUL byte"
            for number, line in enumerate(physical_lines(text), 1)
            if "\0" in line
        ],
        "write it again as UTF-8 text, or name its encoding (`encoding=utf-16`, ...).",
    )
    if not text.strip():
        raise DataError(f"{shown}: the file holds only blanks\nFix: give a file with rows.")
    return text


def physical_lines(text: str) -> Iterable[str]:
    """Return the lines of `text` with their ends, which are LF, CR LF or a lone CR."""
    return io.StringIO(text, newline="")


def _refuse_wide(data: bytes, shown: str) -> None:
    for mark, name in WIDE_MARKS.items():
        if data.startswith(mark):
            raise DataError(
                f"{shown}: the file is {name.upper()} (by its byte order mark), not UTF-8\n"
                f"Fix: pass `encoding={name}`, or convert it: iconv -f {name} -t utf-8 OLD > NEW."
            )


def _refuse_invalid(data: bytes, file: str) -> None:
    problems, offset = [], 0
    try:
        data.decode(UTF8)
        return
    except UnicodeDecodeError:
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                line.decode(UTF8)
            except UnicodeDecodeError as error:
                at = offset + error.start
                problems.append(f"{place(file, number)}: byte {at} is 0x{data[at]:02x}")
            offset += len(line)
    raise_all(
        DataError,
        f"{printable(file, PATH_LIMIT)}: not valid UTF-8",
        problems,
        "convert it to UTF-8, or name its encoding; spreadsheets often write `encoding=cp1252`.",
    )
