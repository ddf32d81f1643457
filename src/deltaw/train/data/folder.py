"""Find the training, validation and test files of a data folder by their names."""

import re
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import DataError, raise_all
from deltaw.train.data.rows import PATH_LIMIT
from deltaw.train.escape import printable

PARTS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "dev", "val", "devset"),
    "test": ("test", "eval", "testset"),
}
SEPARATOR = re.compile(r"[-_. ]")
# In order of preference when a folder holds the same parts in several formats.
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


@dataclass(frozen=True, slots=True)
class Found:
    """The file of each part (None where there is none), and what was decided on the way."""

    train: Path
    validation: Path | None
    test: Path | None
    notes: tuple[str, ...]


def find_parts(folder: Path) -> Found:
    """Return the files of a folder's parts.

    A part is a file called train, training, trainset, validation, valid, dev, val, devset, test,
    eval or testset, or one whose name ends in such a word (`sts-dev.tsv`). Raises `DataError` when
    there is no training file, or several files claim one part.
    """
    shown = printable(str(folder), PATH_LIMIT)
    files = _data_files(folder)
    claims = {part: _claims(files, words) for part, words in PARTS.items()}
    ending, notes = _one_format(claims)
    chosen = {
        part: [path for path in paths if path.suffix.lower() == ending] or paths
        for part, paths in claims.items()
    }
    raise_all(
        DataError,
        f"{shown}: several files for one part",
        [f"{part}: {_names(paths)}" for part, paths in chosen.items() if len(paths) > 1],
        "keep one file per part, or give the training file itself.",
    )
    if not chosen["train"]:
        raise DataError(
            f"{shown}: no training file; the folder holds {_names(files) or 'no data files'}\n"
            "Fix: name the files train, validation and test (.csv, .tsv, .json, .jsonl, "
            ".parquet, .arrow), or give one file instead of the folder."
        )
    train, validation, test = (next(iter(chosen[part]), None) for part in PARTS)
    assert train is not None
    return Found(train, validation, test, notes)


def loose_files(folder: Path) -> list[Path]:
    """Return the data files of a folder if they are of one format and no name speaks of a part."""
    files = _data_files(folder)
    one_format = len({path.suffix.lower() for path in files}) == 1
    words = {word for words in PARTS.values() for word in words}
    spoken = any(words & {*SEPARATOR.split(path.stem.lower())} for path in files)
    return files if one_format and not spoken else []


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as error:
        shown = printable(str(folder), PATH_LIMIT)
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error


def _claims(files: list[Path], words: tuple[str, ...]) -> list[Path]:
    """Return the files named exactly by one of `words`, else those whose name ends in one."""
    exact = [path for path in files if path.stem.lower() in words]
    return exact or [path for path in files if SEPARATOR.split(path.stem.lower())[-1] in words]


def _one_format(claims: dict[str, list[Path]]) -> tuple[str, tuple[str, ...]]:
    """Return the ending that most parts have, and a note when it was a choice."""

    def parts(ending: str) -> int:
        return sum(
            any(path.suffix.lower() == ending for path in paths) for paths in claims.values()
        )

    ending = max(ENDINGS, key=parts)
    passed = [
        path
        for paths in claims.values()
        for path in paths
        if path.suffix.lower() != ending and any(other.suffix.lower() == ending for other in paths)
    ]
    return ending, ((f"read the {ending} files and not {_names(passed)}",) if passed else ())


def _names(paths: list[Path]) -> str:
    listed = ", ".join(printable(path.name) for path in paths[:10])
    return listed if len(paths) <= 10 else f"{listed}, ... ({len(paths)} files)"
