"""From the names of data sets to samples: read, checked, limited, held out, mixed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from deltaw.errors import ConfigError, DataError, printable, raise_all
from deltaw.language.data.detect import KINDS
from deltaw.language.data.gathering import Gathered, gather, limited
from deltaw.language.data.holding import check_size, hold_out, overlap_warnings, without_leaks
from deltaw.language.data.info import read_tags, tag_problems
from deltaw.language.data.mixing import Strategy, check_mix, mix
from deltaw.language.data.parse import Parsed
from deltaw.language.data.samples import Sample
from deltaw.language.data.schema import Kind, Schema
from deltaw.language.data.sources import Source, resolve
from deltaw.language.data.thoughts import left_out
from deltaw.train.data.decode import UTF8
from deltaw.train.data.rows import Skip, Table
from deltaw.train.data.wording import counted

FAMILIES: Mapping[Kind, str] = {"preference": "preferences", "rating": "rated answers"}


@dataclass(frozen=True, slots=True)
class Request:
    """Which data is wanted and how; the names are those of LLaMA-Factory's settings.

    `dataset` and `eval_dataset` are a file, a folder, a hub name, a name of the dataset_info.json
    in `dataset_dir`, several of these with commas between or as a list; `name#500` takes 500
    samples. `columns` (role to column) and `tags` say what the columns are, for sets without an
    entry. `max_samples` limits every set. `val_size` is a share of the prompts or a number of
    samples, held out by `seed` when there is no validation part and no `eval_dataset`.
    `skip_bad_rows` leaves rows out that make no sense, `allow_leakage` training samples that are
    held out too; both are errors otherwise. `enable_thinking` of False leaves out the thoughts in
    answers, and says of how many.
    """

    dataset: str | Sequence[str]
    eval_dataset: str | Sequence[str] | None = None
    dataset_dir: Path | None = None
    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    mix_strategy: Strategy = "concat"
    interleave_probs: Sequence[float] | None = None
    max_samples: int | None = None
    val_size: float = 0.1
    seed: int = 0
    skip_bad_rows: bool = False
    allow_leakage: bool = False
    encoding: str = UTF8
    enable_thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What one data set gave: `rows` were read, the others count samples of each part."""

    name: str
    schema: Schema
    rows: int
    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """The samples of all data sets; `train` is in the order of the mixture.

    `origins` counts per data set (those of `eval_dataset` last), `skipped` lists every row left
    out, among them the `bad` ones, which make no sense, and the `leaked` ones, which are held out
    too; `warnings` says what a person should know, `hashes` holds the SHA-256 of every file read,
    and `thoughtless` counts the answers in these of which thoughts were left out.
    """

    origins: tuple[Origin, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    skipped: tuple[Skip, ...]
    bad: tuple[Skip, ...]
    leaked: tuple[Skip, ...]
    warnings: tuple[str, ...]
    hashes: Mapping[str, str]
    thoughtless: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of the data: the warnings, and how many answers lost their thoughts."""
        return (*self.warnings, *left_out(self.thoughtless))

    def validation_sets(self) -> dict[str, tuple[Sample, ...]]:
        """Return the validation samples of each data set that has some, by its name."""
        found: dict[str, tuple[Sample, ...]] = {}
        start = 0
        for origin in self.origins:
            part = self.validation[start : start + origin.validation]
            start += origin.validation
            if part:
                found[origin.name] = found.get(origin.name, ()) + part
        return found


def load(request: Request) -> Corpus:
    """Return the samples that `request` asks for.

    Raises:
        ConfigError: for settings out of range or that contradict each other.
        DataError: for data that cannot be found, read or used as it is; it lists all problems of
            the step that failed, with file and line.
    """
    _check(request)
    sources, evaluated = (
        _resolved(request, request.dataset),
        _resolved(request, request.eval_dataset),
    )
    check_mix(request.mix_strategy, request.interleave_probs, len(sources))
    found = gather(
        (*sources, *evaluated),
        encoding=request.encoding,
        skip_bad_rows=request.skip_bad_rows,
        thoughts=request.enable_thinking is not False,
    )
    _check_kinds(found)
    training, judging = found[: len(sources)], found[len(sources) :]
    warnings = [note for one in found for note in one.notes]

    def limit(source: Source, samples: list[Sample]) -> list[Sample]:
        kept, said = limited(source, samples, request.max_samples, request.seed)
        warnings.extend(said)
        return kept

    sets = [limit(s, one.train.samples) for s, one in zip(sources, training, strict=True)]
    held = [one.validation.samples for one in training] + [
        limit(s, one.validation.samples or one.train.samples)
        for s, one in zip(evaluated, judging, strict=True)
    ]
    tests = [one.test.samples for one in training]
    sets, leaked = without_leaks(sets, [*_all(held), *_all(tests)], drop=request.allow_leakage)
    if leaked:
        warnings.append(f"{counted(len(leaked), 'training sample')} dropped because held out too")
    if request.val_size and not any(held):
        sets, held = hold_out(sets, request.val_size, request.seed)
    _check_left(request, sources, sets)
    warnings += overlap_warnings(_all(sets), [*_all(held), *_all(tests)])
    sizes = [len(samples) for samples in sets]
    picks = mix(sizes, request.mix_strategy, request.interleave_probs, request.seed)
    taken = Counter(source for source, _ in picks)
    return Corpus(
        origins=tuple(
            Origin(
                one.name,
                one.schema,
                sum(0 if table is None else len(table.rows) for table in _tables(one)),
                taken[number],
                len(held[number]) if number < len(held) else 0,
                len(tests[number]) if number < len(tests) else 0,
            )
            for number, one in enumerate(found)
        ),
        train=tuple(sets[source][index] for source, index in picks),
        validation=tuple(_all(held)),
        test=tuple(_all(tests)),
        skipped=(*(skip for part in _parts(found) for skip in part.left_out), *leaked),
        bad=tuple(skip for part in _parts(found) for skip in part.problems),
        leaked=tuple(leaked),
        warnings=tuple(warnings),
        hashes={
            table.path: table.sha256 for one in found for table in _tables(one) if table is not None
        },
        thoughtless=sum(part.thoughtless for part in _parts(found)),
    )


def _check(request: Request) -> None:
    check_size(request.val_size)
    if request.max_samples is not None and request.max_samples < 1:
        raise ConfigError(f"max_samples is {request.max_samples}\nFix: give at least 1.")
    raise_all(
        ConfigError,
        "the tags cannot be used",
        tag_problems(request.tags or {}),
        "name keys and speakers as in dataset_info.json, such as role_tag: role.",
    )


def _resolved(request: Request, asked: str | Sequence[str] | None) -> tuple[Source, ...]:
    if asked is None:
        return ()
    return resolve(
        asked,
        dataset_dir=request.dataset_dir,
        columns=request.columns,
        tags=read_tags(request.tags or {}),
    )


def _check_kinds(found: Sequence[Gathered]) -> None:
    """Refuse preferences or rated answers together with anything else."""
    families = {FAMILIES.get(one.schema.kind, "turns and texts") for one in found}
    raise_all(
        DataError,
        "data sets of different kinds cannot be trained on together",
        [f"{printable(one.name)}: {KINDS[one.schema.kind]}" for one in found]
        if len(families) > 1
        else [],
        "preferences, rated answers, and everything else need a run of their own.",
    )


def _check_left(request: Request, sources: Sequence[Source], sets: list[list[Sample]]) -> None:
    """Refuse a mixture with a set of which leaks or holding out left nothing."""
    empty = [source.name for source, samples in zip(sources, sets, strict=True) if not samples]
    if len(empty) == len(sets) or (empty and request.mix_strategy != "concat"):
        raise_all(
            DataError,
            "nothing is left to train on",
            [f"{printable(name)}: every sample is held out" for name in empty],
            "give more rows, a smaller validation_share, or other validation data.",
        )


def _tables(one: Gathered) -> tuple[Table | None, ...]:
    return one.splits.train, one.splits.validation, one.splits.test


def _parts(found: Sequence[Gathered]) -> list[Parsed]:
    return [part for one in found for part in (one.train, one.validation, one.test)]


def _all(sets: Sequence[Sequence[Sample]]) -> list[Sample]:
    return list(chain.from_iterable(sets))
