"""Rows to (text, label) items: rows without text or label are skipped, nonsense is a problem."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

from deltaw.train.data.detect import Schema, Task
from deltaw.train.data.labels import class_name, is_missing, number, spelt
from deltaw.train.data.rows import PATH_LIMIT, Opaque, Row, Skip, Table, Value, place
from deltaw.train.escape import printable


@dataclass(frozen=True, slots=True)
class Item:
    """One usable row; `label` is a class name or a number (None where none is asked for)."""

    text: str
    pair: str | None
    label: str | float | None
    file: str
    line: int

    @property
    def key(self) -> tuple[str, str]:
        """What makes two rows the same text: blanks at the ends do not count."""
        return self.text.strip(), (self.pair or "").strip()

    @property
    def place(self) -> str:
        """`file:line`, safe to show."""
        return place(self.file, self.line)


@dataclass(slots=True)
class Items:
    """The items of one table with everything noticed while reading them."""

    items: list[Item] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    spellings: Counter[tuple[str, str]] = field(default_factory=Counter)


def missing_columns(table: Table, names: Sequence[str]) -> list[str]:
    """Return one sentence for each of `names` that is not a column of `table`."""
    return [
        f'{printable(table.path, PATH_LIMIT)}: no column "{printable(name)}"'
        for name in names
        if name not in table.columns
    ]


def labelled(table: Table, schema: Schema) -> Items:
    """Return the items of `table`, labels read as the task asks."""
    found = Items(skipped=list(table.skipped))
    at = table.columns.index(schema.label)
    for row, texts in _with_text(table, schema.text, found):
        value = row.values[at]
        if is_missing(value):
            found.skipped.append(
                Skip(row.file, row.line, f'no label in "{printable(schema.label)}"')
            )
            continue
        label = _label(value, schema.task)
        if label is None:
            found.problems.append(f"{row.place}: {_complaint(value, schema)}")
            continue
        if isinstance(label, str):
            found.spellings[label, spelt(value)] += 1
        found.items.append(_item(row, texts, label))
    return found


def unlabelled(table: Table, text: Sequence[str]) -> Items:
    """Return the items of `table` without looking for labels."""
    found = Items(skipped=list(table.skipped))
    found.items = [_item(row, texts, None) for row, texts in _with_text(table, text, found)]
    return found


def _item(row: Row, texts: list[str], label: str | float | None) -> Item:
    return Item(texts[0], texts[1] if len(texts) == 2 else None, label, row.file, row.line)


def _with_text(table: Table, names: Sequence[str], found: Items) -> list[tuple[Row, list[str]]]:
    """Return the rows whose text columns all hold text; note the others in `found`."""
    columns = [(table.columns.index(name), name) for name in names]
    kept = []
    for row in table.rows:
        values = [(row.values[index], name) for index, name in columns]
        texts = [value for value, _ in values if isinstance(value, str) and value.strip()]
        if len(texts) == len(columns):
            kept.append((row, texts))
            continue
        wrong = [
            f'column "{printable(name)}" holds {_kind(value)}, not text'
            for value, name in values
            if not isinstance(value, str) and not is_missing(value)
        ]
        if wrong:
            found.problems += [f"{row.place}: {problem}" for problem in wrong]
        else:
            blank = next(n for v, n in values if not (isinstance(v, str) and v.strip()))
            found.skipped.append(Skip(row.file, row.line, f'no text in "{printable(blank)}"'))
    return kept


def _label(value: Value, task: Task) -> str | float | None:
    if task == "regression":
        real = number(value)
        return real if real is not None and isfinite(real) else None
    return None if value is None or isinstance(value, Opaque) else class_name(value)


def _complaint(value: Value, schema: Schema) -> str:
    name = f'label column "{printable(schema.label)}"'
    if isinstance(value, Opaque):
        return f"{name} holds {value.kind}"
    if schema.task == "classification":
        return f"{name} holds {spelt(value)}, not a class"
    if number(value) is not None:
        return f"{name} holds {spelt(value)}, not a finite number"
    return f"{name} holds {spelt(value)}, not a number"


def _kind(value: Value) -> str:
    return value.kind if isinstance(value, Opaque) else f"the value {spelt(value)}"
