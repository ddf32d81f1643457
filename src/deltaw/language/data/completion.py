"""Prompt and completion, and running text."""

from dataclasses import replace

from deltaw.language.data.dialogue import conversation
from deltaw.language.data.instruction import asked, led
from deltaw.language.data.record import BadRow, NoSample, Record, as_text, described
from deltaw.language.data.samples import Completion, Conversation, Message, Passage, Turns
from deltaw.language.data.turns import read_turns


def completion(record: Record) -> Completion | Conversation:
    """Return prompt and completion: plain texts, or turns where they are or something is beside.

    In a conversation the prompt's turns are not trained where answers are, whatever they say.
    """
    prompt, answer = turns_or_text(record, "prompt"), turns_or_text(record, "completion")
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer.strip():
            raise NoSample(f"nothing in {record.name('completion')}")
        if not record.schema.plain:
            return conversation(record, (*asked(record), Message("assistant", answer)))
        return Completion(prompt, answer, record.row.file, record.row.line)
    if isinstance(prompt, str) or isinstance(answer, str):
        raise BadRow("prompt and completion must both be texts, or both be messages")
    given = (replace(turn, trained=None, given=True) for turn in led(record, prompt))
    return conversation(record, (*given, *answer))


def passage(record: Record) -> Passage:
    """Return the text of one row."""
    return Passage(record.required("text"), record.row.file, record.row.line)


def turns_or_text(record: Record, role: str) -> Turns:
    """Return what stands in a column that may hold a text or messages."""
    value = record.value(role)
    if value is None:
        raise NoSample(f"nothing in {record.name(role)}")
    if isinstance(value, str):
        return as_text(value, record.name(role))
    if not isinstance(value, list | dict):
        raise BadRow(f"{record.name(role)} holds {described(value)}, not text or messages")
    return read_turns(value, record.schema.tags, record.name(role))


def as_user(prompt: Turns) -> tuple[Message, ...]:
    """Return a text as the turn of a user, messages as they are."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def as_assistant(answer: Turns) -> tuple[Message, ...]:
    """Return a text as the turn of an assistant, messages as they are."""
    return (Message("assistant", answer),) if isinstance(answer, str) else answer
