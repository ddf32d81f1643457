"""Is what was read enough to train and evaluate on? Each check raises one error with the fix."""

from collections import Counter
from collections.abc import Sequence

from deltaw.errors import LISTED, DataError, raise_all
from deltaw.train.data.items import Item, Items, missing_columns
from deltaw.train.data.rows import PATH_LIMIT, Skip, Table, place
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable

MANY_CLASSES = 20


def check_columns(tables: Sequence[Table], names: Sequence[str], fix: str) -> None:
    """Refuse tables that lack one of the columns."""
    raise_all(
        DataError,
        "columns that the training data has are missing",
        [problem for table in tables for problem in missing_columns(table, names)],
        fix,
    )


def check_rows(parts: Sequence[Items], fix: str) -> None:
    """Refuse rows that make no sense."""
    raise_all(
        DataError,
        "rows that cannot be used",
        [problem for part in parts for problem in part.problems],
        fix,
    )


def check_any(table: Table, part: Items, fix: str) -> None:
    """Refuse a table in which every row was skipped."""
    if not part.items:
        raise_all(
            DataError,
            f"{shown(table)}: nothing is left, skipped: {counted(len(part.skipped), 'row')}",
            _reasons(part.skipped),
            fix,
        )


def check_labels(train: Sequence[Item], table: Table, column: str) -> None:
    """Refuse training labels that are all the same, or nearly all different."""
    counts = Counter(item.label for item in train)
    name = f'{shown(table)}: column "{printable(column)}"'
    if len(counts) < 2:
        only = f'only "{printable(str(next(iter(counts))))}"' if counts else "nothing"
        raise DataError(
            f"{name} holds {only} in {counted(len(train), 'usable training row')}\n"
            "Fix: give at least two different labels, or name another label column."
        )
    classes = isinstance(train[0].label, str)
    if classes and len(counts) > MANY_CLASSES and len(counts) > len(train) / 2:
        raise DataError(
            f"{name} holds {len(counts)} different labels in {len(train)} rows: these are no "
            "classes\nFix: name another label column (label=COLUMN), or task=regression."
        )


def check_known(held_out: Sequence[Item], labels: Sequence[str]) -> None:
    """Refuse held-out classes that training does not have."""
    known = set(labels)
    first: dict[str, Item] = {}
    counts: Counter[str] = Counter()
    for item in held_out:
        if isinstance(item.label, str) and item.label not in known:
            first.setdefault(item.label, item)
            counts[item.label] += 1
    names = ", ".join(f'"{printable(name, 40)}"' for name in labels[:LISTED])
    more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    raise_all(
        DataError,
        "labels that do not occur in training",
        [
            f'"{printable(name)}": {counted(counts[name], "row")}, first {item.place}'
            for name, item in first.items()
        ],
        f"correct or remove these rows, or add training rows; training has {names}{more}.",
    )


def check_most(rows: int | None, labels: Sequence[str]) -> None:
    """Refuse a limit on the training rows that leaves a class without any."""
    if rows is not None and rows < len(labels):
        raise DataError(
            f"max_train_rows is {rows}, and there are {len(labels)} classes\n"
            f"Fix: give at least {len(labels)}, one row for each class."
        )


def shown(table: Table) -> str:
    """Return the path of a table, safe to show."""
    return printable(table.path, PATH_LIMIT)


def _reasons(skipped: Sequence[Skip]) -> list[str]:
    counts = Counter(skip.reason for skip in skipped)
    first = {skip.reason: skip for skip in reversed(skipped)}
    return [
        f"{counted(count, 'row')}: {reason}; first {place(first[reason].file, first[reason].line)}"
        for reason, count in counts.most_common()
    ]
