"""Reading YAML strictly: no duplicate keys, `1e-4` is a number, nothing is ever executed."""

import re
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import ConfigError, raise_all
from deltaw.train.data.rows import place
from deltaw.train.escape import printable

FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1's safe loader with YAML 1.2's floats and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """The writer that quotes whatever `_Loader` would not read back as the same text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, is not a mapping or repeats a key.
    """
    file = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = printable(str(error), 200)
        raise ConfigError(f"{printable(file, 300)} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{_where(file, error)}: not valid YAML: {_reason(error)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place(file, 1)}: a recipe is `key: value` lines; found none.")
    raise_all(
        ConfigError,
        f"{printable(file, 300)} gives keys more than once:",
        [f"{place(file, line)}: {printable(key)}" for key, line in _repeated(node)],
        "keep one line for each key.",
    )
    try:
        values: dict[str, Any] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_where(file, error)}: not valid YAML: {_reason(error)}") from error
    return values


def value(text: str) -> Any:
    """Return what one `key=value` means after the `=`, read as YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {printable(text)!r}: {_reason(error)}") from error


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


def _where(file: str, error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return place(file, mark.line + 1) if mark else printable(file, 300)


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return printable(error.problem or "cannot be read", 200)
    return printable(str(error), 200)
