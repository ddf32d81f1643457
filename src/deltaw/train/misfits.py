"""Sentences about keys and values that do not fit a recipe."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.train.escape import printable
from deltaw.train.spellings import SYNONYMS

AS_HERE: Mapping[str, str] = {}
"""Every key is called as in a recipe."""
MISSING = " is missing"


def unknown(key: str, known: Sequence[str]) -> str:
    """Return what an unknown key may have meant."""
    near = next(iter(difflib.get_close_matches(key, [*known, *SYNONYMS], 1)), None)
    near = SYNONYMS.get(near, near)
    hint = f"; did you mean {near}?" if near else f"; known are {', '.join(known)}"
    return f"unknown key {printable(key)}{hint}"


def misfit(detail: Any, names: Mapping[str, str] = AS_HERE) -> str:
    """Return what is wrong with a value by pydantic's account; `names` has other names of keys."""
    first, *inner = detail["loc"]
    key = ".".join(printable(str(part)) for part in (names.get(first, first), *inner))
    if detail["type"] == "missing":
        return f"{key}{MISSING}"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    if detail["type"] == "list_type" and isinstance(value, str | int | float):
        message += f", such as [{printable(str(value))}]"
    return f"{key}={printable(repr(value))}: {message}"


def named(problem: str, names: Mapping[str, str]) -> str:
    """Return a sentence about keys with what the file calls them, where that is another name."""
    others = [
        f"{key} is {name}"
        for key, name in names.items()
        if name != key and re.search(rf"(?<![\w.]){key}(=| has no effect)", problem)
    ]
    return f"{problem} (in the file, {' and '.join(others)})" if others else problem


def follows(problem: str, problems: Sequence[str]) -> bool:
    """Tell whether a key is missing only because of another problem with it."""
    key = problem.removesuffix(MISSING)
    return key != problem and any(known.startswith(key) for known in problems)
