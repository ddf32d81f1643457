"""Every error deltaw raises on purpose.

    DeltawError
    ├── ConfigError  (ValueError)    a setting is out of range or contradicts another
    ├── TargetError  (ValueError)    a name or pattern matches nothing, or a layer cannot be adapted
    ├── FormatError  (ValueError)    a file is damaged, or does not fit the model
    ├── DataError    (ValueError)    training data cannot be used as it is
    ├── StateError   (RuntimeError)  the right call at the wrong moment (merged, ...)
    ├── MergeError   (RuntimeError)  a merge would lose or corrupt something
    └── RunError     (RuntimeError)  a training run cannot start or go on
        └── DivergedError            its numbers became NaN or Inf

Each inherits a built-in too, so `except ValueError` works where people expect it. Names that come
from a file are shown `printable`. Nothing else of deltaw is imported here.
"""

from collections.abc import Sequence

LISTED = 20
"""How many of many like things are shown, such as rows of data; the rest is counted."""


class DeltawError(Exception):
    """Root of all errors raised on purpose by deltaw."""

    most = 1000
    """How many problems one error lists: all, unless a message would no longer be read."""


class ConfigError(DeltawError, ValueError):
    """A setting is out of range or contradicts another."""


class TargetError(DeltawError, ValueError):
    """A name or pattern matches nothing, or names a layer that cannot be adapted."""


class FormatError(DeltawError, ValueError):
    """A file is damaged, or does not fit the model."""


class DataError(DeltawError, ValueError):
    """Training data cannot be used as it is; rows go wrong by the thousand, so few are listed."""

    most = LISTED


class StateError(DeltawError, RuntimeError):
    """The model is not in a state in which this call makes sense."""


class MergeError(DeltawError, RuntimeError):
    """A merge would lose or corrupt something."""


class RunError(DeltawError, RuntimeError):
    """A training run cannot start or go on."""


class DivergedError(RunError):
    """The numbers of a training run, or of what it made, became NaN or Inf."""


def raise_all(
    error: type[DeltawError], headline: str, problems: Sequence[str], fix: str = ""
) -> None:
    """Raise one `error` that lists up to its `most` problems and the fix; do nothing for none."""
    if not problems:
        return
    lines = [headline, *(f"  - {problem}" for problem in problems[: error.most])]
    if len(problems) > error.most:
        lines.append(f"  ... and {len(problems) - error.most} more")
    if fix:
        lines.append(f"Fix: {fix}")
    raise error("\n".join(lines))


def printable(text: str, limit: int = 80) -> str:
    """Return `text` on one line of at most `limit` characters, with everything invisible spelt out.

    Control characters (ANSI escapes among them), line breaks, bidirectional controls, zero-width
    characters, unassigned code points and half surrogates become `\\n`, `\\x1b`, `\\u202e`, ...;
    ordinary letters of every script stay as they are.
    """
    shown = "".join(c if c.isprintable() else _spelt(c) for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
