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
    "patterns, names = json.load(sys.stdin)\n"
    "tables = [[re.fullmatch(p, name) is not None for name in names] for p in patterns]\n"
    "json.dump(tables, sys.stdout)\n"
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
    return _tables([pattern], paths)[0]


def pattern_value(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of `path`, as PEFT does.

    A key matches where `(.*\\.)?(KEY)$` matches the path from its start, so `^` pins the start.
    """
    return pattern_values(patterns, [path], default)[0]


def pattern_values(
    patterns: Mapping[str, Value], paths: Sequence[str], default: Value
) -> list[Value]:
    """Return `pattern_value` of every path, with one pass over the patterns."""
    values: dict[str, Value] = {}
    odd = [key for key in patterns if not _NAME.fullmatch(key)]
    tables = dict(zip(odd, _tables([_ending(key) for key in odd], paths), strict=True))
    known = set(paths)
    for key, value in patterns.items():
        if key in tables:
            hits = [path for path, hit in zip(paths, tables[key], strict=True) if hit]
        elif key.startswith("^"):
            hits = [name] if (name := _name(key)) in known else []
        else:
            hits = [path for path in paths if ends_with(path, _name(key))]
        for path in hits:
            values.setdefault(path, value)
    return [values.get(path, default) for path in paths]


def key_matches(key: str, paths: Sequence[str]) -> list[bool]:
    """Tell for each path whether a key of `rank_pattern` or `alpha_pattern` matches it."""
    return [hit is not None for hit in pattern_values({key: True}, paths, None)]


def _name(key: str) -> str:
    return key.removeprefix("^").removesuffix("$").replace("\\", "")


def _ending(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"


def _tables(patterns: Sequence[str], paths: Sequence[str]) -> list[list[bool]]:
    """Return `full_matches` of each pattern, all of the slow ones in one child process."""
    compiled = {pattern: _compiled(pattern) for pattern in patterns}
    slow = [pattern for pattern in patterns if not _is_simple(pattern)]
    tables = dict(zip(slow, _in_child(slow, paths), strict=True)) if slow else {}
    for pattern in compiled.keys() - tables:
        tables[pattern] = [compiled[pattern].fullmatch(path) is not None for path in paths]
    return [tables[pattern] for pattern in patterns]


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"The pattern {pattern[:60]!r}... has {len(pattern)} characters, more than {LONGEST}.\n"
            "Fix: give a list of names instead."
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise ConfigError(f"{pattern!r} is not a regular expression: {problem}") from None


def _is_simple(pattern: str) -> bool:
    """Tell whether matching takes quadratic time at most: few quantifiers, on single characters."""
    bare = re.sub(r"\[(?:\\.|[^\]\\])*\]|\\.", "a", pattern.removeprefix(r"(?:.*\.)?"))
    return len(re.findall(r"[*+?{]", bare.replace("(?:", "("))) <= 2 and not re.search(
        r"\)[*+?{]", bare
    )


def _in_child(patterns: Sequence[str], paths: Sequence[str]) -> list[list[bool]]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(patterns), list(paths)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(repr(pattern) for pattern in patterns[:3])
        raise ConfigError(
            f"Matching {shown} took more than {SECONDS:g} s.\n"
            "Fix: avoid nested repetition such as `(a+)+`, or give a list of names."
        ) from None
    tables: list[list[bool]] = json.loads(child.stdout)
    return tables
