"""What every reader produces: rows of plain values that remember their file and line."""

from dataclasses import dataclass, field
from typing import Any

from deltaw.train.escape import printable

PATH_LIMIT = 300


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is neither text, number, truth value nor null: a list, an object, a date.

    `raw` is the value itself, for those who can use it; what is compared is `kind`.
    """

    kind: str
    raw: Any = field(default=None, compare=False, repr=False)


Value = str | int | float | bool | None | Opaque


def place(file: str, line: int) -> str:
    """Return `file:line`, safe to show."""
    return f"{printable(file, PATH_LIMIT)}:{line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `line` is the first of its lines in the file, or its number where they tell no rows.

    Both count from 1.
    """

    file: str
    line: int
    values: tuple[Value, ...]

    @property
    def place(self) -> str:
        """`file:line`, safe to show."""
        return place(self.file, self.line)


@dataclass(frozen=True, slots=True)
class Skip:
    """A row that was left out, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{place(self.file, self.line)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Table:
    """A file's columns and rows; `sha256` is the digest of the bytes that were read."""

    path: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    skipped: tuple[Skip, ...]
    sha256: str

    def column(self, name: str) -> list[Value]:
        """Return the values of one column, top to bottom."""
        index = self.columns.index(name)
        return [row.values[index] for row in self.rows]
