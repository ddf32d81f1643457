"""A table to samples: rows that hold nothing are skipped, rows that make no sense are problems."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from deltaw.language.data.completion import completion, passage
from deltaw.language.data.detect import find
from deltaw.language.data.dialogue import dialogue
from deltaw.language.data.instruction import instances, instruction
from deltaw.language.data.preference import preference, rated
from deltaw.language.data.record import BadRow, NoSample, Record, records
from deltaw.language.data.samples import Sample
from deltaw.language.data.schema import MEDIA, Schema
from deltaw.language.data.thoughts import without_thoughts
from deltaw.train.data.rows import Opaque, Skip, Table

EMPTY: tuple[object, ...] = (None, "", [])
OPTIONAL = frozenset({"query", "history", "system", "tools", *MEDIA})


@dataclass(slots=True)
class Parsed:
    """The samples of one table with everything noticed while reading them.

    `thoughtless` counts the answers of which thoughts were left out.
    """

    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    problems: list[Skip] = field(default_factory=list)
    thoughtless: int = 0

    @property
    def left_out(self) -> list[Skip]:
        """Every row that gave no sample."""
        return self.skipped + self.problems


def parse(table: Table, schema: Schema, *, thoughts: bool = True) -> Parsed:
    """Return the samples of `table` as `schema` has them; nothing is raised for bad rows.

    Without `thoughts` those in answers are left out. A row that has nothing where the schema looks,
    and columns of another schema, is a bad one.
    """
    found = Parsed(skipped=list(table.skipped))
    for record in records(table, schema):
        try:
            record.refuse_media()
            samples = _samples(record)
            if not thoughts:
                changed = [without_thoughts(sample) for sample in samples]
                samples = [sample for sample, _ in changed]
                found.thoughtless += sum(count for _, count in changed)
            found.samples += samples
        except NoSample as error:
            other = other_schema(table, record)
            left = found.problems if other else found.skipped
            reason = f"{error}; its own columns are of another kind, {other}" if other else error
            left.append(Skip(record.row.file, record.row.line, str(reason)))
        except BadRow as error:
            found.problems.append(Skip(record.row.file, record.row.line, str(error)))
    return found


def other_schema(table: Table, record: Record) -> str | None:
    """Return what a row's own columns are where it has nothing in those of its table's schema."""
    if any(record.value(role) not in EMPTY for role in record.schema.columns):
        return None
    row = record.row
    values = zip(table.columns, row.values, strict=True)
    raw = ((n, v, v.raw if isinstance(v, Opaque) else v) for n, v in values)
    filled = {name: value for name, value, inner in raw if inner not in EMPTY}
    own = replace(row, values=tuple(filled.values()))
    schema = find(replace(table, columns=tuple(filled), rows=(own,)))
    return None if schema is None else schema.reasons


def missing_columns(table: Table, schema: Schema) -> list[str]:
    """Return the columns that `schema` needs and `table` lacks."""
    return [
        name
        for role, name in schema.columns.items()
        if role not in OPTIONAL and name not in table.columns
    ]


def _samples(record: Record) -> Iterable[Sample]:
    match record.schema.kind:
        case "instruction":
            return [instruction(record)]
        case "instances":
            return list(instances(record))
        case "dialogue":
            return [dialogue(record)]
        case "completion":
            return [completion(record)]
        case "text":
            return [passage(record)]
        case "preference":
            return [preference(record)]
        case "rating":
            return [rated(record)]
