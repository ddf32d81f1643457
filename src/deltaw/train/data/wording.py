"""Counts, sizes and examples in sentences."""

from collections.abc import Sequence

FIRST = 3


def counted(count: int, noun: str) -> str:
    """Return `1 row`, `2 rows`, `12,000 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: int) -> str:
    """Return `640 bytes`, `21.3 kB`, `90.9 MB`."""
    if count < 1000:
        return counted(count, "byte")
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def some(parts: Sequence[str]) -> str:
    """Return the first three of `parts` on one line, and how many more there are."""
    more = f"; and {len(parts) - FIRST} more" if len(parts) > FIRST else ""
    return "; ".join(parts[:FIRST]) + more
