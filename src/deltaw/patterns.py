"""Matching module paths by name or regular expression, in bounded time.

Patterns come from users and from adapter files written by strangers, and one such as `(a+)+b` can
take Python's `re` years. Names and simple expressions are matched here; every other expression is
evaluated in a child process that is stopped after `SECONDS`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from deltaw.errors import ConfigError

LONGEST = 1000
SECONDS = 5.0
Value = TypeVar("Value")

_NAME = re.compile(r"\^?(?:[\w-]|\\?\.|\\-)*\$?")
_CHILD = (
    "import json, re, sys\n"
    "pattern, names = json.load(sys.stdin)\n"
    "compiled = re.compile(pattern)\n"
    "json.dump([compiled.fullmatch(name) is not None for name in names], sys.stdout)\n"
)


def ends_with(path: str, name: str) -> bool:
    """Tell whether `path` is `name` or ends in `.name`."""
    return path == name or path.endswith("." + name)


def within(path: str, roots: Collection[str]) -> bool:
    """Tell whether `path` is one of `roots` or lies inside one."""
    return any(path == root or path.startswith(root + ".") for root in roots)


def full_matches(pattern: str, paths: Sequence[str]) -> list[bool]:
    """Tell for each path whether `pattern` matches the whole of it.

    Raises:
        ConfigError: if the expression is not valid, longer than `LONGEST`, or takes too long.
    """
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"The pattern {pattern[:60]!r}... has {len(pattern)} characters, more than {LONGEST}.\n"
            "Fix: give a list of names instead."
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise ConfigError(f"{pattern!r} is not a regular expression: {problem}") from None
    if _is_simple(pattern):
        return [compiled.fullmatch(path) is not None for path in paths]
    return _in_child(pattern, paths)


def pattern_value(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of `path`, as PEFT does.

    A key matches where `(.*\\.)?(KEY)$` matches the path from its start, so `^` pins the start.
    """
    return pattern_values(patterns, [path], default)[0]


def pattern_values(
    patterns: Mapping[str, Value], paths: Sequence[str], default: Value
) -> list[Value]:
    """Return `pattern_value` of every path, with one pass over the patterns."""
    values = [default] * len(paths)
    open_ = set(range(len(paths)))
    for key, value in patterns.items():
        for index, hit in enumerate(key_matches(key, paths)):
            if hit and index in open_:
                open_.remove(index)
                values[index] = value
    return values


def key_matches(key: str, paths: Sequence[str]) -> list[bool]:
    """Tell for each path whether a key of `rank_pattern` or `alpha_pattern` matches it."""
    if _NAME.fullmatch(key):
        name = key.removeprefix("^").removesuffix("$").replace("\\", "")
        pinned = key.startswith("^")
        return [path == name if pinned else ends_with(path, name) for path in paths]
    return full_matches(rf"(?:.*\.)?(?:{key})", paths)


def _is_simple(pattern: str) -> bool:
    """Tell whether matching takes quadratic time at most: few quantifiers, on single characters."""
    bare = re.sub(r"\[(?:\\.|[^\]\\])*\]|\\.", "a", pattern)
    return len(re.findall(r"[*+?{]", bare)) <= 2 and not re.search(r"\)[*+?{]", bare)


def _in_child(pattern: str, paths: Sequence[str]) -> list[bool]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, list(paths)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"The pattern {pattern!r} took more than {SECONDS:g} s to match.\n"
            "Fix: avoid nested repetition such as `(a+)+`, or give a list of names."
        ) from None
    matches: list[bool] = json.loads(child.stdout)
    return matches
