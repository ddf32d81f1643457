"""Alpaca's schema and its kin: a request, its answer, and what was said before.

Source: the files of Stanford Alpaca and of Self-Instruct (arXiv:2212.10560); `system` and `history`
as LLaMA-Factory has them.
"""

from collections.abc import Iterator
from typing import Any

from deltaw.language.data.dialogue import tools
from deltaw.language.data.record import BadRow, NoSample, Record, as_json, as_text, described
from deltaw.language.data.samples import Conversation, Message
from deltaw.language.data.turns import with_system


def instruction(record: Record) -> Conversation:
    """Return system, history, request and answer of one row as a conversation, tools beside."""
    answer = Message("assistant", record.required("response"))
    turns = (*asked(record), answer)
    return Conversation(turns, record.row.file, record.row.line, tools(record))


def instances(record: Record) -> Iterator[Conversation]:
    """Return one conversation per instance: an input with its output."""
    found = as_json(record.value("instances"), record.name("instances"))
    if not found:
        raise NoSample("no instances")
    if not isinstance(found, list):
        raise BadRow(f"{record.name('instances')} holds {described(found)}, not a list")
    told = record.required("prompt")
    for number, instance in enumerate(found, 1):
        where = f"instance {number}"
        if not isinstance(instance, dict):
            raise BadRow(f"{where} is {described(instance)}, not an object")
        given, answer = (as_text(instance.get(key) or "", where) for key in ("input", "output"))
        if not answer.strip():
            raise NoSample(f"{where} has no output")
        turns = (Message("user", joined(told, given)), Message("assistant", answer))
        whole = with_system(record.text("system"), turns)
        yield Conversation(whole, record.row.file, record.row.line, tools(record))


def asked(record: Record) -> tuple[Message, ...]:
    """Return what comes before the answer: system, history, and the request."""
    request = joined(record.text("prompt"), record.text("query"))
    if not request.strip():
        raise NoSample(f"nothing in {record.name('prompt')}")
    turns = (*_history(record), Message("user", request))
    return with_system(record.text("system"), turns)


def led(record: Record, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a prompt of messages with the row's system text and history before it.

    Raises:
        BadRow: if the row has an input beside, which belongs to a request in words.
    """
    if record.text("query").strip():
        raise BadRow(
            f"{record.name('query')} holds an input, and {record.name('prompt')} holds messages; "
            "write it into the last of them, or name the columns without it"
        )
    own = prompt[:1] if prompt[0].role == "system" else ()
    turns = (*own, *_history(record), *prompt[len(own) :])
    return with_system(record.text("system"), turns)


def joined(told: str, given: str) -> str:
    """Return the request and its input on a new line, or the one that is not blank."""
    return "\n".join(text for text in (told, given) if text.strip())


def _history(record: Record) -> Iterator[Message]:
    value: Any = record.value("history")
    rounds = as_json(value, record.name("history")) if value else []
    if not isinstance(rounds, list):
        raise BadRow(f"{record.name('history')} holds {described(rounds)}, not a list of rounds")
    for number, pair in enumerate(rounds, 1):
        where = f"round {number} of {record.name('history')}"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{where} is not a pair of request and answer")
        request, answer = (as_text(text, where) for text in pair)
        if not request.strip() or not answer.strip():
            raise NoSample(f"{where} is empty")
        yield Message("user", request)
        yield Message("assistant", answer)
