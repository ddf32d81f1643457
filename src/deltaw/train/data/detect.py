"""Which columns are text, which one is the label, and which task that makes."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltaw.errors import DataError, raise_all
from deltaw.train.data.labels import is_missing, number, spelt
from deltaw.train.data.names import LABELS, PAIRS, TEXTS, plain
from deltaw.train.data.rows import PATH_LIMIT, Opaque, Table, Value
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable

Task = Literal["classification", "regression"]
SAMPLE = 1000
FEW_VALUES = 20


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns in use and the task; `reasons` is the sentence that says how they were found."""

    text: tuple[str, ...]
    label: str
    task: Task
    reasons: str


def detect(
    table: Table,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    task: Task | None = None,
) -> Schema:
    """Return the schema of a training table; what is given overrides what would be found.

    Columns are found by their names first, then by their values; labels that are real numbers make
    a regression. Raises `DataError` describing every column when that leaves a doubt.
    """
    given = () if text is None else (text,) if isinstance(text, str) else tuple(text)
    _check_given(table, given, label)
    if label is None:
        label, label_reason = _find_label(table, given)
    else:
        label_reason = "as given"
    if given:
        columns, text_reason = given, "as given"
    else:
        columns, text_reason = _find_text(table, label)
    if task is None:
        task, task_reason = find_task(table.column(label))
    else:
        task_reason = "as given"
    texts = " + ".join(f'"{printable(name)}"' for name in columns)
    reasons = (
        f"text: {texts} ({text_reason}); label: "
        f'"{printable(label)}" ({label_reason}); task: {task} ({task_reason})'
    )
    return Schema(columns, label, task, reasons)


def find_task(labels: Sequence[Value]) -> tuple[Task, str]:
    """Return the task that the labels make, and why."""
    present = [value for value in labels if not is_missing(value)]
    numbers = [number(value) for value in present]
    reals = [value for value in numbers if value is not None]
    if not reals or len(reals) < len(numbers):
        return "classification", "labels are names"
    if not all(value.is_integer() for value in reals):
        return "regression", "labels are real numbers"
    distinct = len(set(reals))
    if distinct > FEW_VALUES and distinct > len(reals) / 2:
        return "regression", "labels are numbers and nearly all differ"
    return "classification", f"labels are {distinct} whole numbers"


def _check_given(table: Table, text: tuple[str, ...], label: str | None) -> None:
    named = [*text, *(() if label is None else (label,))]
    problems = []
    for name in dict.fromkeys(named):
        if name not in table.columns:
            near = difflib.get_close_matches(name, table.columns, n=1)
            hint = f'; did you mean "{printable(near[0])}"?' if near else ""
            problems.append(f'no column "{printable(name)}"{hint}')
        if named.count(name) > 1:
            problems.append(f'column "{printable(name)}" is named more than once')
    if len(text) > 2:
        problems.append(f"{len(text)} text columns; one text or a pair of texts is possible")
    columns = ", ".join(f'"{printable(name)}"' for name in table.columns[:30])
    raise_all(
        DataError,
        f"{printable(table.path, PATH_LIMIT)}: the columns asked for do not fit",
        problems,
        f"choose among the file's columns: {columns}.",
    )


def _find_label(table: Table, text: tuple[str, ...]) -> tuple[str, str]:
    rest = [name for name in table.columns if name not in text]
    for known in LABELS:
        for name in rest:
            if plain(name) == known:
                return name, "by its name"
    likely = [name for name in rest if _is_label_like(table.column(name))]
    if len(likely) != 1:
        _doubt(table, "label", "label=COLUMN")
    return likely[0], "the only column with few, repeated values"


def _find_text(table: Table, label: str) -> tuple[tuple[str, ...], str]:
    names = {plain(name): name for name in table.columns if name != label}
    for first, second in PAIRS:
        if first in names and second in names:
            return (names[first], names[second]), "a pair, by their names"
    for known in TEXTS:
        if known in names:
            return (names[known],), "by its name"
    likely = [name for name in names.values() if _is_text_like(table.column(name)[:SAMPLE])]
    if len(likely) == 2 and _are_twins(*likely):
        return (likely[0], likely[1]), "a pair, by their names and values"
    if len(likely) != 1:
        _doubt(table, "text", "text=COLUMN, or two columns for a pair")
    return (likely[0],), "the only column of running text"


def _are_twins(first: str, second: str) -> bool:
    """Do two names differ only in a 1 against a 2, or an a against a b?"""
    return any(
        re.sub(rf"(?<![A-Za-z]){one}|{one}(?![A-Za-z])", "?", plain(first))
        == re.sub(rf"(?<![A-Za-z]){two}|{two}(?![A-Za-z])", "?", plain(second))
        for one, two in (("1", "2"), ("a", "b"))
    )


def _is_text_like(values: Sequence[Value]) -> bool:
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    words = sum(len(text.split()) for text in texts)
    return len(texts) > 0.9 * len(values) and words > 2 * len(texts)


def _is_label_like(values: Sequence[Value]) -> bool:
    present = [value for value in values if not is_missing(value)]
    if any(isinstance(value, Opaque) for value in present) or _is_text_like(values[:SAMPLE]):
        return False
    return 2 <= len({spelt(value) for value in present}) <= len(present) / 2


def _doubt(table: Table, role: str, option: str) -> None:
    def described(name: str) -> str:
        values = {spelt(value): None for value in table.column(name)}
        examples = ", ".join(list(values)[:3])
        return f'"{printable(name)}": {counted(len(values), "different value")}, such as {examples}'

    raise_all(
        DataError,
        f"{printable(table.path, PATH_LIMIT)}: cannot tell which column is the {role}",
        [described(name) for name in table.columns],
        f"name it: {option}; or, for a language model, what its columns hold: "
        "columns='{prompt: COLUMN, response: COLUMN}'.",
    )
