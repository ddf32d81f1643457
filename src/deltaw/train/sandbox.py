"""Jinja's sandbox for chat templates, with bounds of calls, turns of loops and memory.

Whatever makes a text, or a list, is counted before it is made: operators, filters, methods of
texts, and what is written. Every turn of a loop and every slice is a call, and calls are counted.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from deltaw.errors import ConfigError
from deltaw.train.escape import printable

LONGEST = 10_000_000
"""Characters of one text, or members of one list, at which a template is taken to run away."""
MOST = 200_000_000
"""Characters that one rendering may make in all."""
CALLS = 200_000
"""Calls and turns of loops of one rendering at which a template is taken to run away."""
WIDE = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)")
"""A conversion by `%` that pads to a width."""
WIDE_FIELD = re.compile(r"[:!][^{}]*(\d{4}|\{)")
"""A field of `str.format` that pads to a width."""
GROWING = (
    {"center", "expandtabs", "format", "format_map", "join"}
    | {"ljust", "replace", "rjust", "translate", "zfill"}
)  # fmt: skip
"""Methods of texts whose result may be longer than all that they are given."""
PASSING = (
    {"attr", "count", "d", "default", "dictsort", "first", "format", "groupby", "items", "last"}
    | {"length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select"}
    | {"selectattr", "sort", "sum", "truncate", "unique"}
)
"""Filters that make no text longer than those they are given, and one bounded as `%` is."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Around what `{% generation %}` marks while a template is rendered; no text may hold them."""


class Refused(TemplateError):
    """What a template says is wrong with a conversation."""


class RunsAway(ConfigError):
    """A template without an end, or without a bound of memory."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"The chat template runs away: {why}.\n"
            "Fix: give another with template=NAME, or correct the tokenizer's."
        )


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the names that chat templates expect; what they make is counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self.kept,
        )
        self.begin()
        self.filters["tojson"] = _as_json
        self.filters["format"] = self._formatted
        for name, function in self.filters.items():
            self.filters[name] = self._bounded(name, function)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now

    def begin(self) -> None:
        """Count from nothing."""
        self.calls, self.made = 0, 0.0

    def kept(self, value: Any) -> Any:
        """Return a value that is kept or written as text, its size counted."""
        self._count(_size(value))
        return value

    def part(self, value: Any) -> Any:
        """Return a slice, its length counted."""
        self._count(_length(value))
        return value

    def joined(self, *parts: Any) -> str:
        """Return values as one text: `~`."""
        self._count(_size(parts))
        return "".join(map(str, parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function within bounds."""
        self.calls += 1
        if self.calls > CALLS:
            raise RunsAway(f"it calls and its loops turn more than {CALLS:,} times")
        method = getattr(function, "__wrapped__", function)  # str.format, wrapped by Jinja
        text = getattr(method, "__self__", None)
        if not isinstance(text, str):
            return super().call(context, function, *args, **kwargs)
        if method.__name__ in GROWING:
            given = [*args, *kwargs.values()]
            self._make_room(text, *([given] if "format" in method.__name__ else given))
        value = super().call(context, function, *args, **kwargs)
        self._count(_length(value))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what could need unbounded memory, within bounds."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and numbers and max(abs(left), abs(right)) > 1000:
            raise RunsAway(f"** of more than {LONGEST:,} digits")
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "+" or (operator == "*" and numbers):
            self._count(_length(left) + _length(right))
        elif operator == "*":
            counts = [v if isinstance(v, int | float) else _size(v) for v in (left, right)]
            self._count(max(0, counts[0] * counts[1]))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return Jinja's `str.format` for a text that pads to no width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and WIDE_FIELD.search(value.__self__):
            raise RunsAway("it formats text to a width")
        return wrapped

    def _formatted(self, text: Any, *args: Any, **kwargs: Any) -> str:
        return self._percent(str(text), kwargs or args)

    def _percent(self, text: str, values: Any) -> str:
        if WIDE.search(text):
            raise RunsAway("it formats text to a width")
        self._make_room(text, [values])
        return str(self.part(text % values))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that counts what it makes."""
        if name in PASSING:
            return function
        own = hasattr(function, "jinja_pass_arg")  # Jinja's context goes before the values

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            args = tuple([*arg] if isinstance(arg, GeneratorType) else arg for arg in args)
            self._make_room(*args[own:], *kwargs.values())
            value = function(*args, **kwargs)
            self._count(_length(value))
            return value

        return bounded

    def _make_room(self, *values: Any) -> None:
        """Raise where the largest value, as often as the size of the next or a number, is much."""
        sizes = sorted(abs(v) if isinstance(v, int) else _size(v) for v in values)
        largest = sizes.pop()
        if largest > LONGEST or largest * max([1, *sizes[-1:]]) > MOST:
            raise RunsAway(f"it makes text of more than {LONGEST:,} characters")

    def _count(self, size: float) -> None:
        self.made += size
        if size > LONGEST or self.made > MOST:
            raise RunsAway(f"it makes text of more than {LONGEST:,} characters")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return tree


class _Counted(NodeTransformer):
    """Puts a call into every loop, around every slice, and in the place of every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        turn = nodes.ExprStmt(_call("part", [nodes.Const(None)]))
        node.body.insert(0, turn.set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes).set_lineno(node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        return _call("part", [node]).set_lineno(node.lineno)


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


class _Generation(Extension):
    """`{% generation %}` of transformers: what is inside is the model's to write."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = nodes.CallBlock(self.call_method("_marked"), [], [], body)
        return marked.set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _length(value: Any) -> int:
    """Return the characters of a text, the members of a list and their characters, or bits."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(len(v) if isinstance(v, str) else 1 for v in value)
    return value.bit_length() if isinstance(value, int) else 1


def _size(value: Any) -> int:
    """Return about how long a value is as text, whatever it holds, or more than the `LONGEST`.

    What lies deep is longer, as text that is indented.
    """
    total, waiting = 0, [(value, 0)]
    while waiting and total <= LONGEST:
        value, depth = waiting.pop()
        total += depth + (1 if isinstance(value, list | tuple) else _length(value))
        if isinstance(value, Mapping):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
    return total


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(indent, 16),
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> Iterator[str]:
    raise Refused(printable(message, 200))


def _now(form: str) -> str:
    return datetime.now().strftime(form)
