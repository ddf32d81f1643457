"""Counts in sentences."""


def counted(count: int, noun: str) -> str:
    """Return `1 row`, `2 rows`, `12,000 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
