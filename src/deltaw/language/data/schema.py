"""What a schema is: which column plays which role, and how the turns of a dialogue are spelt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["instruction", "instances", "dialogue", "completion", "text", "preference", "rating"]
Speaker = Literal["system", "user", "assistant", "tool", "call"]
"""Who speaks a turn; a `call` is an assistant turn that consists of calls of functions."""

MEDIA = ("images", "videos", "audios")
ROLES = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    *MEDIA,
    "chosen",
    "rejected",
    "kto_tag",
    "completion",
    "text",
)
"""What a column can be: the names of LLaMA-Factory's dataset_info.json, and the last two."""

SPEAKERS: Mapping[str, Speaker] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "model": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
        "tool": "tool",
        "observation": "tool",
        "function": "tool",
        "tool_response": "tool",
        "function_call": "call",
        "tool_call": "call",
    }
)


@dataclass(frozen=True, slots=True)
class Tags:
    """The keys of a message and the names of speakers.

    With None the role is found under `role` or `from`, the content under `content` or `value`.
    """

    role: str | None = None
    content: str | None = None
    speakers: Mapping[str, Speaker] = field(default_factory=lambda: SPEAKERS)


@dataclass(frozen=True, slots=True)
class Schema:
    """How the rows of a table become samples; `columns` maps a role to the column that plays it.

    `plain` texts are used as they are, others become the turns of a chat. `reasons` is the sentence
    that says what was decided and why.
    """

    kind: Kind
    columns: Mapping[str, str]
    reasons: str
    plain: bool = False
    tags: Tags = field(default_factory=Tags)
