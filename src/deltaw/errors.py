"""Every error deltaw raises on purpose.

    DeltawError
    ├── ConfigError  (ValueError)    a setting is out of range or contradicts another
    ├── TargetError  (ValueError)    a name or pattern matches nothing, or a layer cannot be adapted
    ├── FormatError  (ValueError)    a file is damaged, or does not fit the model
    ├── DataError    (ValueError)    training data cannot be used as it is
    ├── StateError   (RuntimeError)  the right call at the wrong moment (merged, ...)
    ├── MergeError   (RuntimeError)  a merge would lose or corrupt something
    └── RunError     (RuntimeError)  a training run cannot start or go on

Each inherits a built-in too, so `except ValueError` works where people expect it. Nothing else of
deltaw is imported here.
"""

from collections.abc import Sequence

LISTED = 20


class DeltawError(Exception):
    """Root of all errors raised on purpose by deltaw."""


class ConfigError(DeltawError, ValueError):
    """A setting is out of range or contradicts another."""


class TargetError(DeltawError, ValueError):
    """A name or pattern matches nothing, or names a layer that cannot be adapted."""


class FormatError(DeltawError, ValueError):
    """A file is damaged, or does not fit the model."""


class DataError(DeltawError, ValueError):
    """Training data cannot be used as it is."""


class StateError(DeltawError, RuntimeError):
    """The model is not in a state in which this call makes sense."""


class MergeError(DeltawError, RuntimeError):
    """A merge would lose or corrupt something."""


class RunError(DeltawError, RuntimeError):
    """A training run cannot start or go on."""


def raise_all(
    error: type[DeltawError], headline: str, problems: Sequence[str], fix: str = ""
) -> None:
    """Raise one `error` that lists all `problems` and the fix; do nothing when there are none."""
    if not problems:
        return
    lines = [headline, *(f"  - {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"  ... and {len(problems) - LISTED} more")
    if fix:
        lines.append(f"Fix: {fix}")
    raise error("\n".join(lines))
