"""Tables for a model that is already trained: labelled ones to evaluate, plain ones to predict."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.train.data.checks import check_any, check_columns, check_known, check_rows
from deltaw.train.data.detect import Schema
from deltaw.train.data.examples import Example, to_examples
from deltaw.train.data.items import labelled, unlabelled
from deltaw.train.data.labels import spelling_warnings
from deltaw.train.data.rows import Skip, Table
from deltaw.train.escape import printable

CORRECT = "correct or remove these rows."


@dataclass(frozen=True, slots=True)
class Part:
    """The examples of one table, the rows left out, and what a person should know."""

    examples: tuple[Example, ...]
    skipped: tuple[Skip, ...]
    warnings: tuple[str, ...]


def build_evaluation(table: Table, schema: Schema, labels: Sequence[str]) -> Part:
    """Return the labelled examples of `table` for a model that knows the classes `labels`.

    Raises `DataError` listing bad rows, missing columns, or labels that the model does not know.
    """
    names = [*schema.text, schema.label]
    check_columns([table], names, _as_trained(names))
    found = labelled(table, schema)
    check_rows([found], CORRECT)
    check_any(table, found, "give rows that have a text and a label.")
    if schema.task == "classification":
        check_known(found.items, labels)
    warnings = spelling_warnings(found.spellings)
    return Part(to_examples(found.items, labels), tuple(found.skipped), tuple(warnings))


def build_texts(table: Table, text: Sequence[str]) -> Part:
    """Return the examples of `table` without labels; `text` names one column or a pair.

    Raises `DataError` listing bad rows or missing columns.
    """
    check_columns([table], text, _as_trained(text))
    found = unlabelled(table, text)
    check_rows([found], CORRECT)
    check_any(table, found, "give rows that have a text.")
    return Part(to_examples(found.items, ()), tuple(found.skipped), ())


def _as_trained(names: Sequence[str]) -> str:
    columns = ", ".join(f'"{printable(name)}"' for name in names)
    return f"name its columns as in the data that the run was trained on: {columns}."
