"""Numbers as text: sensible digits, medians with their spread, tables of Markdown."""

import statistics
from collections.abc import Iterable, Sequence


def digits(number: float) -> str:
    """Return three significant digits, or all before the point."""
    return f"{number:,.0f}" if abs(number) >= 100 or number == 0 else f"{number:#.3g}"


def median(numbers: Iterable[float], scale: float = 1.0) -> str:
    """Return the scaled median, or nothing of nothing."""
    known = list(numbers)
    return digits(scale * statistics.median(known)) if known else ""


def percent(shares: Iterable[float]) -> str:
    """Return the median share in percent, or nothing of nothing."""
    known = list(shares)
    return f"{100 * statistics.median(known):.1f}%" if known else ""


def spread(numbers: Sequence[float]) -> str:
    """Return the median with the smallest and the largest where they differ."""
    low, high = (digits(end(numbers, default=0.0)) for end in (min, max))
    middle = median(numbers)
    return middle if low == high else f"{middle} ({low} to {high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
