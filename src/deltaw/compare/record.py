"""The file of a comparison: its settings, and every run that is done."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaw.compare.search import DIVERGED, Trial
from deltaw.errors import RunError, raise_all
from deltaw.train import staging
from deltaw.train.escape import printable
from deltaw.train.recipe import Recipe

FILE = "comparison.json"
KIND = "deltaw comparison 1"
BEGINNINGS = {"base": "the base model's weights", "tokenizer": "the tokenizer"}
"""What every method begins from, by the keys of its digests."""


@dataclass
class Record:
    """What a comparison is of, and what it found so far; `runs` are by the trials' keys.

    `methods` holds all that was ever compared here, `compared` names those of now.
    """

    shared: dict[str, Any]
    data: dict[str, str]
    methods: dict[str, dict[str, Any]]
    compared: list[str]
    machine: dict[str, str]
    examined: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The name of the score."""
        return str(self.examined[self.compared[0]]["metric"])

    def score(self, trial: Trial) -> tuple[float, float] | None:
        """Return validation score and negative loss of a trial, `None` if it was not run."""
        entry = self.runs.get(trial.key)
        if entry is None:
            return None
        if entry["diverged"]:
            return DIVERGED
        return entry["validation"] or 0.0, -(entry["validation_loss"] or 0.0)


def write(folder: Path, record: Record, summary: Mapping[str, Any]) -> None:
    """Write the record and what follows from it in one step."""
    values = {"kind": KIND, "summary": summary, **asdict(record)}
    staging.write_text(folder / FILE, _lines(values))


def _lines(values: Mapping[str, Any]) -> str:
    """Return JSON with a line for each run and each other entry of a mapping."""
    parts = []
    for key, value in values.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, dict) and value:
            rows = [
                f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items()
            ]
            text = "{\n" + ",\n".join(rows) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(folder: Path) -> Record | None:
    """Return the record in a folder, or `None` if there is none.

    Raises:
        RunError: if the file is damaged or no comparison.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError("it is not what this release writes")
        values.pop("summary")
        return Record(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{printable(str(path), 300)} is damaged: {printable(str(error), 200)}\n"
            "Fix: restore the file, or start over with --overwrite."
        ) from error


def joined(old: Record | None, new: Record, folder: Path) -> Record:
    """Return `new` with what `old` knows already; methods, rates and seeds may have been added.

    Raises:
        RunError: listing what differs in a way that makes old runs and new ones incomparable.
    """
    if old is None:
        return new
    problems = [f"{key} {change}" for key, change in _changes(old.shared, new.shared)]
    if old.data != new.data:
        problems.append("the data changed (other hashes)")
    problems += [
        f"{printable(title)}: {key} {change}"
        for title, values in new.methods.items()
        for key, change in _changes(old.methods.get(title, values), values)
    ]
    raise_all(
        RunError,
        f"{printable(str(folder), 300)} holds another comparison:",
        problems,
        "repeat the old settings, start over with --overwrite, or use another --output.",
    )
    new.methods = old.methods | new.methods
    new.examined, new.runs = old.examined, old.runs
    return new


def changed(record: Record, others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what of the model `others` began from something else than the record did.

    A record of an earlier release may not say it of every method and run.
    """
    known = [*record.examined.values(), *record.runs.values(), *others]
    return [
        text
        for key, text in BEGINNINGS.items()
        if len({entry[key] for entry in known if entry.get(key) is not None}) > 1
    ]


def require_same_base(record: Record, seen: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raise `RunError` if not all of a record, and all that was `seen` now, is of one model."""
    raise_all(
        RunError,
        f"{printable(str(folder), 300)} holds another comparison:",
        [f"{what} changed (another digest)" for what in changed(record, seen)],
        "restore what was there, start over with --overwrite, or use another --output.",
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what differs; a value that is not given is the recipe's default."""
    for key in sorted(old.keys() | new.keys()):
        usual = Recipe.model_fields[key].get_default() if key in Recipe.model_fields else None
        before, now = (values.get(key, usual) for values in (old, new))
        if before != now:
            yield key, f"was {_shown(before)}, is now {_shown(now)}"


def _shown(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False, default=str), 200)
