"""Chat templates, rendered without access to Python and within bounds of output and turns."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deltaw.errors import ConfigError
from deltaw.train.escape import printable

LONGEST = 10_000_000
"""Characters of output at which a template is taken to run away."""
TURNS = 200_000
"""Turns of all loops of one rendering at which a template is taken to run away."""
WIDE = re.compile(r"%[^%a-zA-Z]*\d{4}")
"""A conversion that pads to a width."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Around what `{% generation %}` marks while a template is rendered; no text may hold them."""

Span = tuple[int, int]


class Refused(TemplateError):
    """What a template says is wrong with a conversation, or that it runs away."""


class Template:
    """A chat template of a model, with the names of its special tokens.

    Raises:
        ConfigError: if it is no Jinja template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self.tokens = tokens
        try:
            self._template = _Sandbox().from_string(source)
        except TemplateError as error:
            raise ConfigError(
                f"The chat template cannot be read: {printable(str(error), 200)}\n"
                "Fix: give another with template=NAME, or correct the tokenizer's."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the spans that the template marks as answers.

        `prompt` ends it with the words that the model's next answer begins after.

        Raises:
            Refused: if the template raises, reads what is not there, or runs away.
        """
        sandbox = self._template.environment
        assert isinstance(sandbox, _Sandbox)
        sandbox.turns = 0
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            ):
                length += len(piece)
                if length > LONGEST:
                    raise Refused(f"it writes more than {LONGEST:,} characters")
                pieces.append(piece)
        except Refused:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = f"the template cannot read it: {printable(str(error), 200)}"
            raise Refused(reason) from error
        except (RecursionError, MemoryError) as error:
            raise Refused("it runs away") from error
        return _unmarked("".join(pieces))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the names that chat templates expect; every turn of a loop counts."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.turns = 0
        self.filters["tojson"] = _as_json
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now

    def turn(self) -> None:
        """Count one turn of a loop."""
        self.turns += 1
        if self.turns > TURNS:
            raise Refused(f"its loops turn more than {TURNS:,} times")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what could need unbounded memory, within bounds."""
        sizes = [abs(v) if isinstance(v, int | float) else len(v) for v in (left, right)]
        text = not all(isinstance(value, int | float) for value in (left, right))
        if (operator == "*" and text and sizes[0] * sizes[1] > LONGEST) or (
            operator == "**" and max(sizes) > 1000
        ):
            raise Refused(f"{operator} gives more than {LONGEST:,} characters")
        if operator == "%" and isinstance(left, str) and WIDE.search(left):
            raise Refused("text formatted to a width")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            count = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(count).set_lineno(loop.lineno))
        return tree


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


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Return the text without marks, and the spans that were between two of them."""
    plain, *marked = text.split(BEGIN)
    spans = []
    for part in marked:
        inside, _, after = part.partition(END)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return plain, spans


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
