"""What language models are trained on: one class for each kind of sample.

Every sample remembers the file and line it came from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `tool_calls` have the form of OpenAI's chat completions.

    A call is `{"type": "function", "function": {"name": str, "arguments": {...}}}`. `trained` is
    what the row says about its loss; with None assistant turns are trained and others are not, nor
    are turns `given` as the prompt of an answer that stands apart.
    `call_ids` are the row's ids of its calls, None for a call without; a tool's turn `answers` the
    call of an id, and has the `name` of the function. They make no two turns different.
    """

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    trained: bool | None = None
    call_ids: tuple[str | None, ...] = field(default=(), compare=False)
    answers: str | None = field(default=None, compare=False)
    name: str | None = field(default=None, compare=False)
    given: bool = False

    @property
    def learnt(self) -> bool:
        """Whether it is trained where answers are."""
        if self.trained is None:
            return self.role == "assistant" and not self.given
        return self.trained


Turns = tuple[Message, ...] | str
"""Messages, which a chat template renders, or a plain text, which is used as it is."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue that ends with an assistant message; `tools` are JSON schemas of functions."""

    messages: tuple[Message, ...]
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain text and how it goes on, without a chat template."""

    prompt: str
    completion: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A plain text of which every token is trained."""

    text: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Rated:
    """A prompt with one answer that is good or bad, as KTO (arXiv:2402.01306) learns from."""

    prompt: Turns
    completion: Turns
    good: bool
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()


Sample = Conversation | Completion | Passage | Preference | Rated


def messages_of(sample: Sample) -> Iterator[Message]:
    """Yield every turn of a sample; plain texts have none."""
    match sample:
        case Conversation():
            parts: tuple[Turns, ...] = (sample.messages,)
        case Preference():
            parts = sample.prompt, sample.chosen, sample.rejected
        case Rated():
            parts = sample.prompt, sample.completion
        case Completion() | Passage():
            return
    for turns in parts:
        if not isinstance(turns, str):
            yield from turns


def has_tools(sample: Sample) -> bool:
    """Tell whether the model of a sample may call functions."""
    return not isinstance(sample, Completion | Passage) and bool(sample.tools)
