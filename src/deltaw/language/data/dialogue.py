"""Messages of several turns, in the spellings of OpenAI and of ShareGPT."""

from collections.abc import Mapping
from typing import Any

from deltaw.language.data.calls import read_tools
from deltaw.language.data.record import NoSample, Record
from deltaw.language.data.samples import Conversation, Message
from deltaw.language.data.turns import check_turns, read_turns, with_system

Tools = tuple[Mapping[str, Any], ...]


def dialogue(record: Record) -> Conversation:
    """Return the messages of one row, its system text in front and its tools beside."""
    turns = said(record)
    return conversation(record, turns)


def said(record: Record) -> tuple[Message, ...]:
    """Return the messages of one row with its system text, still unchecked."""
    turns = read_turns(record.value("messages"), record.schema.tags, record.name("messages"))
    turns = tuple(turn for turn in turns if turn.role != "system" or turn.content.strip())
    if not turns:
        raise NoSample(f"no message in {record.name('messages')}")
    return with_system(record.text("system"), turns)


def tools(record: Record) -> Tools:
    """Return the functions that the model of one row may call."""
    value = record.value("tools")
    return read_tools(value, record.name("tools")) if value else ()


def conversation(record: Record, turns: tuple[Message, ...]) -> Conversation:
    """Return checked turns as a conversation; at least one of them must be trained."""
    check_turns(turns)
    if not any(turn.learnt for turn in turns):
        raise NoSample(
            'no turn is trained: its marks ("loss", "weight", "train") leave every answer out'
        )
    return Conversation(turns, record.row.file, record.row.line, tools(record))
