"""Reading YAML strictly: no duplicate keys, `1e-4` is a number, nothing is ever executed."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from deltaw.errors import ConfigError, raise_all
from deltaw.train.data.rows import place
from deltaw.train.escape import printable

UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What reading raises: ValueError for a number of thousands of digits."""

PAIRS = "write one `key: value` in a line; a text with a colon, # or brackets in quotes"
TYPES = {
    "null": (r"(|~|null|Null|NULL)\Z", ["", "~", "n", "N"]),
    "bool": (r"(true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    "int": (r"-?(0|[1-9][0-9]*)\Z", list("-0123456789")),
    "float": (
        r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
}
"""What is not text, by type: its form, and the characters it may begin with."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's null, truth values and numbers; every other word is text, as `on` and `1:30`.

    Numbers with leading zeros or a plus are text too, so that a name such as `007` stays whole; a
    setting that wants a number takes it from there. Aliases and tags are refused.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*name) are not read", event)
        if event.tag is not None:
            raise _refused("tags (!name) are not read", event)
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if is_key and not isinstance(event, yaml.ScalarEvent):
            raise _refused("a key must be a single word or text", event)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """The writer that quotes what `_Loader`, or any reader of YAML 1.1, would not take as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _name, (_form, _begins) in TYPES.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_form), _begins)


def _refused(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def read(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, is not a mapping or repeats a key.
    """
    file = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = printable(str(error), 200)
        raise ConfigError(
            f"{printable(file, 300)} cannot be read: {reason}\n"
            "Fix: give the path of a text file in UTF-8 that may be read."
        ) from error
    try:
        node = yaml.compose(text, _Loader)
        values: dict[str, Any] = yaml.load(text, _Loader)
    except UNREADABLE as error:
        raise ConfigError(
            f"{_where(file, error)}: not valid YAML: {_reason(error)}\nFix: {PAIRS}."
        ) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place(file, 1)}: no `key: value` is found.\nFix: {PAIRS}.")
    raise_all(
        ConfigError,
        f"{printable(file, 300)} gives keys more than once:",
        [f"{place(file, line)}: {printable(key)}" for key, line in _repeated(node)],
        "keep one line for each key.",
    )
    return values


def value(text: str) -> Any:
    """Return what one `key=value` means after the `=`, read as YAML."""
    try:
        return yaml.load(text, _Loader)
    except UNREADABLE as error:
        raise ConfigError(
            f"cannot read the value {printable(text)!r}: {_reason(error)}\n"
            "Fix: put quotes around a text with brackets, braces, colons or exclamation marks."
        ) from error


def write(values: dict[str, Any], comment: str) -> str:
    """Return a mapping as YAML in its own order below a comment line; strange text is escaped."""
    return f"# {comment}\n" + yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def _repeated(node: yaml.Node) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            if key.value in seen:
                found.append((key.value, key.start_mark.line + 1))
            seen.add(key.value)
            found += _repeated(child)
    elif isinstance(node, yaml.SequenceNode):
        found = [pair for child in node.value for pair in _repeated(child)]
    return found


def _where(file: str, error: Exception) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return place(file, mark.line + 1) if mark else printable(file, 300)


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return printable(error.problem or "cannot be read", 200)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return printable(str(error), 200)
