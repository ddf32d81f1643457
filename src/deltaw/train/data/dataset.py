"""From the parts of a data set to clean examples: checks, held-out rows, class numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw.errors import LISTED, DataError
from deltaw.train.data.checks import (
    check_any,
    check_columns,
    check_known,
    check_labels,
    check_most,
    check_rows,
    shown,
)
from deltaw.train.data.detect import Schema
from deltaw.train.data.examples import Example, to_examples
from deltaw.train.data.items import Item, Items, labelled
from deltaw.train.data.labels import in_order, spelling_warnings
from deltaw.train.data.overlaps import leaks, repetition_warnings, without_leaks
from deltaw.train.data.rows import Skip, Table
from deltaw.train.data.split import hold_out, sample
from deltaw.train.data.table import Splits
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable


@dataclass(frozen=True, slots=True)
class Data:
    """The parts of a data set as examples; `labels[i]` names class i (none in a regression).

    `skipped` lists every row left out, `spare` counts the training rows beyond `max_train_rows`,
    `warnings` says what a person should know, `hashes` holds the SHA-256 of every file read.
    """

    schema: Schema
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    skipped: tuple[Skip, ...]
    spare: int
    warnings: tuple[str, ...]
    hashes: Mapping[str, str]


def build(
    splits: Splits,
    schema: Schema,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.0,
    allow_leakage: bool = False,
    max_train_rows: int | None = None,
) -> Data:
    """Check all parts and return their examples.

    Without a test part, `test_share` of the training texts are held out, and without a validation
    part `validation_share` of the rest: stratified by class, drawn by `seed`, rows of one text
    never parted. `max_train_rows` then keeps a stratified sample of what is left. Raises
    `DataError` listing the problems of all parts, among them training rows that are held out too;
    `allow_leakage` drops those from training instead.
    """
    _check_settings({"validation": validation_share, "test": test_share}, max_train_rows)
    train, validation, test, warnings = _read(splits, schema)
    held = [*validation.items, *test.items]
    items, dropped = without_leaks(train.items, held, drop=allow_leakage)
    if dropped:
        warnings.append(f"{counted(len(dropped), 'training row')} dropped because held out too")
    warnings += repetition_warnings(items)
    check_labels(items, splits.train, schema.label)
    classes = schema.task == "classification"
    labels = in_order(str(item.label) for item in items) if classes else ()
    if classes:
        check_known(held, labels)
        check_most(max_train_rows, labels)
    tested, held_out = test.items, validation.items
    if not tested and test_share:
        items, tested = hold_out(items, test_share, seed)
        warnings += _split_warnings(splits.train, items, tested)
    if splits.validation is None and validation_share:
        items, held_out = hold_out(items, validation_share, seed)
        warnings += _split_warnings(splits.train, items, held_out)
    kept = items if max_train_rows is None else sample(items, max_train_rows, seed)
    tables = (splits.train, splits.validation, splits.test)
    return Data(
        schema=schema,
        train=to_examples(kept, labels),
        validation=to_examples(held_out, labels),
        test=to_examples(tested, labels),
        labels=labels,
        skipped=(*train.skipped, *validation.skipped, *test.skipped, *dropped),
        spare=len(items) - len(kept),
        warnings=tuple(warnings),
        hashes={table.path: table.sha256 for table in tables if table is not None},
    )


def _check_settings(shares: Mapping[str, float], max_train_rows: int | None) -> None:
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise DataError(f"the {part} share is {share}\nFix: give a number from 0 to below 1.")
    if max_train_rows is not None and max_train_rows < 2:
        raise DataError(f"max_train_rows is {max_train_rows}\nFix: give at least 2.")


def _read(splits: Splits, schema: Schema) -> tuple[Items, Items, Items, list[str]]:
    """Return the items of training, validation and test part, and the warnings so far."""
    test = splits.test
    if test is not None and schema.label not in test.columns:
        test = None
    tables = (splits.train, splits.validation, test)
    present = [table for table in tables if table is not None]
    check_columns(
        present,
        [*schema.text, schema.label],
        "give every part the same column names, or name the columns to use.",
    )
    parts = [Items() if table is None else labelled(table, schema) for table in tables]
    check_rows(parts, "correct or remove these rows, or name other columns.")
    needed = "name the columns to use, or give rows that have a text and a label."
    check_any(splits.train, parts[0], needed)
    if splits.validation is not None:
        check_any(splits.validation, parts[1], needed)
    train, validation, tested = parts
    warnings = list(splits.notes)
    warnings += spelling_warnings(train.spellings + validation.spellings + tested.spellings)
    if splits.test is not None and not tested.items:
        warnings.append(f"{shown(splits.test)}: no labels, so the test part is not used")
    if shared := leaks(validation.items, tested.items):
        warnings.append(f"in the test part too: {counted(len(shared), 'validation row')}")
    return train, validation, tested, warnings


def _split_warnings(table: Table, kept: Sequence[Item], held_out: Sequence[Item]) -> list[str]:
    """Refuse a split that holds nothing out; name the classes that are in training only."""
    if not held_out:
        raise DataError(
            f"{shown(table)}: too few rows to hold any out: no label has two different texts\n"
            "Fix: add rows, give the part as a file, or set its share to 0."
        )
    held = {item.label for item in held_out}
    alone = [label for label in Counter(item.label for item in kept) if label not in held]
    if isinstance(held_out[0].label, float) or not alone:
        return []
    names = ", ".join(f'"{printable(str(label), 40)}"' for label in alone[:LISTED])
    more = f" and {len(alone) - LISTED} more" if len(alone) > LISTED else ""
    return [f"not evaluated, because only two different texts or more can be split: {names}{more}"]
