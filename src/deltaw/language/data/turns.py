"""The turns of a dialogue: read from messages in any of the usual spellings, and checked."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import printable
from deltaw.language.data.calls import as_id, read_calls
from deltaw.language.data.record import BadRow, NoSample, as_json, as_text, described
from deltaw.language.data.samples import Message
from deltaw.language.data.schema import Speaker, Tags

TRAINED = ("loss", "loss_weight", "loss_scale", "weight", "train")
REASONING = ("reasoning_content", "reasoning", "thinking")


def read_turns(value: Any, tags: Tags, name: str) -> tuple[Message, ...]:
    """Return the messages of a list, of one object, or of JSON text.

    Raises:
        BadRow: if a turn has no role or an unknown one, or content that is not text.
        NoSample: if there is no turn.
    """
    turns = as_json(value, name) if value else []
    listed = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(listed, list):
        raise BadRow(f"{name} holds {described(listed)}, not a list of messages")
    if not listed:
        raise NoSample(f"no message in {name}")
    where = name if isinstance(turns, Mapping) else "turn {}"
    return tuple(
        _message(turn, tags, where.format(number)) for number, turn in enumerate(listed, 1)
    )


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse turns in an order that makes no sense, and turns that say nothing.

    The system speaks first or never; nobody but a tool speaks twice in a row; a tool answers the
    assistant.

    Raises:
        BadRow: for the order.
        NoSample: for an empty turn, without a user's, or when the last is not the assistant's.
    """
    before = None
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system" and number > 1:
            raise BadRow(f"turn {number} is a system turn, which is possible once and first only")
        if role == before != "tool":
            raise BadRow(f"turns {number - 1} and {number} are both {role} turns")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow(f"turn {number} is a tool turn, and the assistant called nothing before")
        before = role
    for number, message in enumerate(messages, 1):
        if message.role in ("user", "assistant") and not (
            message.content.strip() or message.tool_calls
        ):
            raise NoSample(f"turn {number} is empty ({message.role})")
    if before != "assistant":
        raise NoSample(f"the last turn is a {before} turn, so nothing answers it")
    if not any(message.role == "user" for message in messages):
        raise NoSample("no user turn")


def with_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return `messages` with `system` in front, unless they begin with the same.

    Raises:
        BadRow: if they begin with another system turn.
    """
    if not system.strip():
        return messages
    if messages[0].role != "system":
        return Message("system", system), *messages
    if messages[0].content.strip() != system.strip():
        raise BadRow("two system turns: the system column and the first turn differ")
    return messages


def _message(turn: Any, tags: Tags, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{where} is {described(turn)}, not an object")
    speaker = _speaker(turn, tags, where)
    content = _first(turn, (tags.content,) if tags.content else ("content", "value"))
    for key in REASONING:
        if turn.get(key):
            raise BadRow(
                f'{where} has "{key}" apart from its content; '
                "write it into the content: <think>...</think>answer"
            )
    trained = _trained(turn, where)
    if speaker == "call":
        calls, ids = read_calls(content, where)
        if not calls:
            raise NoSample(f"{where} calls nothing")
        return Message("assistant", "", calls, trained, ids)
    calls, ids = read_calls(turn.get("tool_calls"), f"the calls of {where}")
    more, others = read_calls(turn.get("function_call"), f"the call of {where}")
    if (calls or more) and speaker != "assistant":
        raise BadRow(f"{where} calls functions, and only the assistant can")
    said = _content(content, where)
    if speaker == "tool":
        answers = as_id(turn.get("tool_call_id"), f"the tool_call_id of {where}")
        name = as_id(turn.get("name"), f"the name of {where}")
        return Message(speaker, said, (), trained, (), answers, name)
    return Message(speaker, said, calls + more, trained, ids + others)


def _speaker(turn: Mapping[str, Any], tags: Tags, where: str) -> Speaker:
    keys = (tags.role,) if tags.role else ("role", "from")
    role = _first(turn, keys)
    if role is None:
        raise BadRow(f"{where} has no role ({' or '.join(printable(key) for key in keys)})")
    name = as_text(role, f"the role of {where}")
    speaker = tags.speakers.get(name) or tags.speakers.get(name.strip().lower())
    if speaker is None:
        near = difflib.get_close_matches(name.lower(), tags.speakers, n=1)
        hint = f'; did you mean "{printable(near[0])}"?' if near else ""
        raise BadRow(f'{where} has the unknown role "{printable(name, 40)}"{hint}')
    return speaker


def _content(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return "" if value is None else as_text(value, f"the content of {where}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            shown = f'"{printable(kind, 40)}"' if isinstance(kind, str) else described(part)
            raise BadRow(f"{where} has a part that is not text: {shown}")
        texts.append(as_text(_first(part, ("text", "value")), f"a part of {where}"))
    return "".join(texts)


def _trained(turn: Mapping[str, Any], where: str) -> bool | None:
    given = {key: turn[key] for key in TRAINED if turn.get(key) is not None}
    for key, weight in given.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise BadRow(
                f'{where} has "{key}": {described(weight)}; only 0 and 1 (false, true) are possible'
            )
    if len({bool(weight) for weight in given.values()}) > 1:
        raise BadRow(f"{where} is to be trained and not to be: {', '.join(given)} contradict")
    return next((bool(weight) for weight in given.values()), None)


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value that is there and not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)
