"""One row, asked by role; what cannot become a sample says so."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import printable
from deltaw.language.data.schema import MEDIA, Schema
from deltaw.train.data.rows import Opaque, Row, Table


class NoSample(Exception):
    """A row that is left out because it holds nothing to train on."""


class BadRow(Exception):
    """A row that makes no sense."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row whose values are found by the roles of its schema."""

    row: Row
    schema: Schema
    places: Mapping[str, int]

    def value(self, role: str) -> Any:
        """Return what the column of `role` holds; None without a column, for null and for NaN."""
        place = self.places.get(role)
        value = None if place is None else self.row.values[place]
        if isinstance(value, Opaque):
            return value.raw
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, role: str) -> str:
        """Return the text of `role`, empty when there is none."""
        value = self.value(role)
        return "" if value is None else as_text(value, self.name(role))

    def required(self, role: str) -> str:
        """Return the text of `role`; a row without it gives no sample."""
        text = self.text(role)
        if not text.strip():
            raise NoSample(f"nothing in {self.name(role)}")
        return text

    def name(self, role: str) -> str:
        """Return the column of `role` in quotes, safe to show."""
        return f'"{printable(self.schema.columns[role])}"'

    def refuse_media(self) -> None:
        """Raise `BadRow` when the row has images, videos or sound."""
        for role in MEDIA:
            if self.value(role):
                raise BadRow(f"{self.name(role)} holds something, and training is on text only")


def records(table: Table, schema: Schema) -> Sequence[Record]:
    """Return the rows of `table`; optional columns that it lacks are as good as empty."""
    places = {
        role: table.columns.index(name)
        for role, name in schema.columns.items()
        if name in table.columns
    }
    return [Record(row, schema, places) for row in table.rows]


def as_text(value: Any, name: str) -> str:
    """Return `value`, which must be text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRow(f"{name} holds {described(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds half of a surrogate pair") from error
    return value


def as_json(value: Any, name: str) -> Any:
    """Return lists and objects as they are, a text as the JSON it holds."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        json.dumps(parsed, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"{name}: no valid JSON: {error.msg} (character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name}: cannot be read as JSON: {printable(str(error))}") from error
    return parsed


def described(value: Any) -> str:
    """Return what `value` is, in words."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if value is None or isinstance(value, str | bool | int | float):
        return f"the value {printable(json.dumps(value, ensure_ascii=False), 40)}"
    return f"a value of type {type(value).__name__}"
