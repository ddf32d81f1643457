"""Lists of places that may be long."""

from collections.abc import Sequence

SHOWN = 5


def listed(lines: Sequence[str], *, every: bool) -> list[str]:
    """Return all lines, or the first few and how many more there are."""
    if every or len(lines) <= SHOWN:
        return list(lines)
    return [*lines[:SHOWN], f"and {len(lines) - SHOWN:,} more; --bad lists all"]
