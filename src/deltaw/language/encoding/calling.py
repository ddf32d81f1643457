"""Messages as chat templates read them: each wants calls of tools in its own way.

Some write an id behind every call and insist on nine letters (Mistral's), some add arguments to a
text (DeepSeek's) where others want an object, some ask whether a turn has content or none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from deltaw.language.data.samples import Message
from deltaw.train.rendering import Template
from deltaw.train.sandbox import Refused

Ids = Literal["own", "filled", "made"]
NINE = re.compile("[A-Za-z0-9]{9}")
LONG = "call_0123456789abcdefghijklmn"
"""An id as OpenAI's are."""
NAME, KEY, VALUE = WORDS = "deltaw_name", "deltaw_key", "deltaw_value"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a template wants calls.

    `ids` are the row's `own`, or also made where a row has none (`filled`), or `made` wherever they
    are not nine letters and digits; made ones count the calls of a conversation. `text` gives
    arguments as JSON text, `none` no content (null) to turns that only call.
    """

    ids: Ids = "own"
    text: bool = False
    none: bool = False


PLAIN = Dialect()


def as_data(messages: Sequence[Message], template: Template) -> list[dict[str, Any]]:
    """Return messages as a template reads them."""
    calls = any(message.tool_calls for message in messages)
    return spoken(messages, dialect_of(template) if calls else PLAIN)


def spoken(messages: Sequence[Message], dialect: Dialect) -> list[dict[str, Any]]:
    """Return messages as templates of a dialect read them."""
    numbered = (f"call{number:05d}" for number in range(1, 100_000))
    waiting: list[tuple[str | None, str | None]] = []
    found = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            own = message.call_ids or (None,) * len(message.tool_calls)
            ids = [_id(one, dialect, numbered) for one in own]
            waiting = list(zip(own, ids, strict=True))
            calls = zip(message.tool_calls, ids, strict=True)
            turn["tool_calls"] = [_call(call, id_, dialect) for call, id_ in calls]
            if dialect.none and not message.content:
                turn["content"] = None
        elif message.role == "tool":
            turn |= _answered(message, waiting)
        found.append(turn)
    return found


def _id(own: str | None, dialect: Dialect, numbered: Iterator[str]) -> str | None:
    if own is not None and (dialect.ids != "made" or NINE.fullmatch(own)):
        return own
    return None if dialect.ids == "own" else next(numbered)


def _call(call: Mapping[str, Any], id_: str | None, dialect: Dialect) -> dict[str, Any]:
    function = dict(call["function"])
    if dialect.text:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function} | ({} if id_ is None else {"id": id_})


def _answered(message: Message, waiting: list[tuple[str | None, str | None]]) -> dict[str, str]:
    """Return which call a tool answers, by its id or else the first that waits; and its name."""
    places = [n for n, (own, _) in enumerate(waiting) if message.answers and own == message.answers]
    id_ = message.answers
    if waiting:
        id_ = waiting.pop(places[0] if places else 0)[1] or id_
    found = {"tool_call_id": id_, "name": message.name}
    return {name: value for name, value in found.items() if value is not None}


@lru_cache(maxsize=64)
def dialect_of(template: Template) -> Dialect:
    """Return how a template wants calls: the first way in which it writes a small conversation.

    Arguments are an object where it takes one, and there is content where it makes no difference.
    """
    ids: tuple[Ids, ...] = ("own", "filled", "made")
    for one, text in product(ids, (False, True)):
        full, empty = Dialect(one, text), Dialect(one, text, none=True)
        with_content, without = _written(template, full), _written(template, empty)
        if with_content and without in (with_content, None):
            return full
        if without:
            return empty
    return PLAIN


def _written(template: Template, dialect: Dialect) -> list[str] | None:
    """Return what a template makes of a call, or None where that is not what was called.

    It must write name and arguments, these not as Python does, and no `None` in place of content.
    """
    call = {"type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    tool = {"name": NAME, "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = ({"type": "function", "function": tool},)
    asked, end = Message("user", "a"), Message("assistant", "b")
    texts = []
    try:
        silent, _ = template.render(spoken((asked, end), dialect), tools)
        for own in (None,) if dialect.ids == "made" else (None, LONG):
            calling = Message("assistant", "", (call,), call_ids=(own,))
            turns = (asked, calling, Message("tool", "c", answers=own), end)
            text, _ = template.render(spoken(turns, dialect), tools)
            if any(text.count(word) <= silent.count(word) for word in WORDS):
                return None
            if "{'" + KEY in text or text.count("None") > silent.count("None"):
                return None
            texts.append(text)
    except Refused:
        return None
    return texts
