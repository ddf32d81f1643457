"""Seconds of an action."""

import time
from collections.abc import Callable


def nothing() -> None:
    """Do nothing."""


def seconds(
    action: Callable[[], object], times: int, between: Callable[[], object] = nothing
) -> list[float]:
    """Return the seconds that `action` took each time, without what is done between two."""
    taken = []
    for number in range(times):
        if number:
            between()
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return taken


def fastest(action: Callable[[], object], times: int) -> float:
    """Return the least seconds that `action` took."""
    return min(seconds(action, times))
