"""Rows written to a file, read back and parsed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.language.data.detect import detect, given
from deltaw.language.data.parse import Parsed, parse
from deltaw.language.data.samples import Message
from deltaw.language.data.schema import Tags
from deltaw.train.data.rows import Table
from deltaw.train.data.table import read_rows


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def table(folder: Path, rows: Sequence[Any]) -> Table:
    return read_rows(write_rows(folder / "rows.jsonl", rows), prose=True)


def parsed(
    folder: Path, rows: Sequence[Any], columns: Any = None, tags: Tags | None = None
) -> Parsed:
    """Parse rows by their detected schema, or by the given columns."""
    found = table(folder, rows)
    return parse(found, given(found, columns, tags or Tags()) if columns else detect(found))


def only(folder: Path, row: Any, **options: Any) -> Any:
    """The one sample of one row, its place checked and taken away."""
    found = parsed(folder, [row], **options)
    assert not found.problems, found.problems
    assert not found.skipped, found.skipped
    (sample,) = found.samples
    assert (sample.file, sample.line) == (str(folder / "rows.jsonl"), 1)
    return sample


def skip_of(folder: Path, row: Any, **options: Any) -> str:
    """Why the one row is skipped."""
    found = parsed(folder, [row], **options)
    assert not found.problems and not found.samples
    (skip,) = found.skipped
    assert skip.line == 1
    return skip.reason


def problem_of(folder: Path, row: Any, **options: Any) -> str:
    """What is wrong with the one row."""
    found = parsed(folder, [row], **options)
    assert not found.skipped and not found.samples
    (problem,) = found.problems
    assert (problem.file, problem.line) == (str(folder / "rows.jsonl"), 1)
    return problem.reason


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)  # type: ignore[arg-type]
