"""Chat templates, rendered without access to Python and within bounds of time and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, meta

from deltaw.errors import ConfigError
from deltaw.train.escape import printable
from deltaw.train.sandbox import BEGIN, END, LONGEST, Refused, RunsAway, Sandbox

Span = tuple[int, int]


class Template:
    """A chat template of a model, with the names of its special tokens.

    Raises:
        ConfigError: if it is no Jinja template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self.tokens = tokens
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except TemplateError as error:
            raise ConfigError(
                f"The chat template cannot be read: {printable(str(error), 200)}\n"
                "Fix: give another with template=NAME, or correct the tokenizer's."
            ) from error

    def variables(self) -> set[str]:
        """Return the names that the template reads and does not set itself."""
        return meta.find_undeclared_variables(self._sandbox.parse(self.source))

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
            Refused: if the template raises, or reads what is not there.
            RunsAway: if it has no end, or takes more memory than any conversation needs.
        """
        self._sandbox.begin()
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
                    raise RunsAway(f"it writes more than {LONGEST:,} characters")
                pieces.append(piece)
        except (Refused, RunsAway):
            raise
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = f"the template cannot read it: {printable(str(error), 200)}"
            raise Refused(reason) from error
        except (RecursionError, MemoryError) as error:
            raise RunsAway("it has no end") from error
        return _unmarked("".join(pieces))


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Return the text without marks, and the spans that were between two of them."""
    plain, *marked = text.split(BEGIN)
    spans = []
    for part in marked:
        inside, _, after = part.partition(END)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return plain, spans
