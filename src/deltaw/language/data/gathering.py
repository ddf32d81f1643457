"""Every data set that was asked for, read and parsed; the problems of all come together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltaw.errors import DataError, printable, raise_all
from deltaw.language.data.detect import detect, given
from deltaw.language.data.parse import Parsed, missing_columns, parse
from deltaw.language.data.reading import read_splits
from deltaw.language.data.samples import Sample
from deltaw.language.data.schema import Schema
from deltaw.language.data.sources import Source
from deltaw.train.data.decode import UTF8
from deltaw.train.data.rows import PATH_LIMIT, Skip, Table
from deltaw.train.data.table import Splits
from deltaw.train.data.wording import counted, some

UNREAD = 5
"""How many of the columns that play no role are named."""


class EmptyError(DataError):
    """Data sets have no sample to train on; `skipped` lists all their rows."""

    skipped: Sequence[Skip] = ()


@dataclass(slots=True)
class Gathered:
    """One data set: its tables, its schema, and the samples of each part."""

    name: str
    splits: Splits
    schema: Schema
    train: Parsed
    validation: Parsed
    test: Parsed
    notes: list[str]


def gather(
    sources: Sequence[Source],
    *,
    encoding: str = UTF8,
    skip_bad_rows: bool = False,
    thoughts: bool = True,
) -> list[Gathered]:
    """Read and parse all data sets; without `thoughts` those in answers are left out.

    Raises one `DataError` for all that cannot be read or fit no schema; or one with all rows that
    make no sense, which `skip_bad_rows` leaves out instead; or one with all of which nothing is
    left.
    """
    found, errors = [], []
    for source in sources:
        try:
            found.append(_gather(source, encoding, thoughts))
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))
    parts = [part for one in found for part in (one.train, one.validation, one.test)]
    if not skip_bad_rows:
        raise_all(
            DataError,
            "rows that cannot be used",
            [str(problem) for part in parts for problem in part.problems],
            "correct or remove these rows; skip_bad_rows=true leaves them out and lists them.",
        )
    _require_samples([one for one in found if not one.train.samples])
    return found


def _require_samples(empty: Sequence[Gathered]) -> None:
    """Raise where data sets have no sample to train on."""
    try:
        raise_all(
            EmptyError,
            "nothing is left to train on",
            [
                f"{_shown(one.splits.train)}: {counted(len(one.train.left_out), 'row')} skipped: "
                + some([str(skip) for skip in one.train.left_out])
                for one in empty
            ],
            "give rows that hold a text or an answer to learn, or name other columns.",
        )
    except EmptyError as error:
        error.skipped = [skip for one in empty for skip in one.train.left_out]
        raise


def limited(
    source: Source, samples: list[Sample], most: int | None, seed: int
) -> tuple[list[Sample], list[str]]:
    """Return as many samples as a data set was asked for, `most` at most, and what to say.

    They are drawn without replacement and stay in their order.
    """
    asked = [limit for limit in (source.limit, source.entry.limit) if limit is not None]
    said = [
        f"{printable(source.name)}: all {counted(len(samples), 'sample')} are used, {limit:,} were "
        "asked for"
        for limit in asked
        if limit > len(samples)
    ]
    limit = min([len(samples), *asked, *([] if most is None else [most])])
    if limit == len(samples):
        return samples, said
    chosen = np.random.default_rng(seed).permutation(len(samples))[:limit]
    return [samples[index] for index in sorted(chosen)], said


def _gather(source: Source, encoding: str, thoughts: bool) -> Gathered:
    entry = source.entry
    splits = read_splits(entry, encoding=encoding)
    if entry.columns:
        schema = given(splits.train, entry.columns, entry.tags, ranking=entry.ranking)
    else:
        schema = detect(splits.train)
    schema = _with_unread(schema, splits.train)
    notes = list(splits.notes)
    test = splits.test
    if test is not None and missing_columns(test, schema):
        notes.append(f"{_shown(test)}: no answers, so the test part is not used")
        test = None
    if splits.validation is not None:
        raise_all(
            DataError,
            f"{_shown(splits.validation)}: columns that the training part has are missing",
            [
                f'no column "{printable(name)}"'
                for name in missing_columns(splits.validation, schema)
            ],
            "give every part the same column names.",
        )
    train, validation, tested = (
        Parsed() if table is None else parse(table, schema, thoughts=thoughts)
        for table in (splits.train, splits.validation, test)
    )
    return Gathered(source.name, splits, schema, train, validation, tested, notes)


def _with_unread(schema: Schema, table: Table) -> Schema:
    """Return the schema with the columns that play no role among its reasons."""
    read = set(schema.columns.values())
    unread = [f'"{printable(name)}"' for name in table.columns if name not in read]
    if not unread:
        return schema
    more = f" and {len(unread) - UNREAD} more" if len(unread) > UNREAD else ""
    shown = ", ".join(unread[:UNREAD]) + more
    return replace(schema, reasons=f"{schema.reasons}; not read: {shown}")


def _shown(table: Table) -> str:
    return printable(table.path, PATH_LIMIT)
