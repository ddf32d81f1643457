"""Answers with a judgement: two to one prompt, the better and the worse, or one good or bad."""

from typing import Any

from deltaw.language.data.completion import as_assistant, as_user, turns_or_text
from deltaw.language.data.dialogue import said, tools
from deltaw.language.data.instruction import asked, led
from deltaw.language.data.record import BadRow, NoSample, Record, described
from deltaw.language.data.samples import Message, Preference, Rated
from deltaw.language.data.turns import check_turns, with_system

JUDGEMENTS = {"true": True, "false": False, "1": True, "0": False}


def preference(record: Record) -> Preference:
    """Return prompt, better and worse answer of one row.

    The answers may be texts, messages, or whole conversations: these share their beginning, which
    is the prompt then.
    """
    chosen, rejected = turns_or_text(record, "chosen"), turns_or_text(record, "rejected")
    row = record.row
    if record.schema.plain and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = turns_or_text(record, "prompt")
        if isinstance(prompt, str):
            for role, text in (("chosen", chosen), ("rejected", rejected)):
                if not text.strip():
                    raise NoSample(f"nothing in {record.name(role)}")
            _refuse_equal(chosen == rejected)
            return Preference(prompt, chosen, rejected, row.file, row.line)
    better, worse = as_assistant(chosen), as_assistant(rejected)
    if better[0].role != "assistant" and worse[0].role != "assistant":
        _refuse_equal(better == worse)
        before, better, worse = _parted(better, worse)
        before = with_system(record.text("system"), before)
    else:
        before = _before(record)
    check_turns((*before, *better))
    check_turns((*before, *worse))
    _refuse_equal(better == worse)
    return Preference(before, better, worse, row.file, row.line, tools(record))


def rated(record: Record) -> Rated:
    """Return prompt, answer and judgement of one row.

    Of messages the last is the answer.
    """
    row, good = record.row, _judgement(record)
    if "messages" in record.schema.columns:
        turns = said(record)
        check_turns(turns)
        return Rated(turns[:-1], turns[-1:], good, row.file, row.line, tools(record))
    role = "completion" if "completion" in record.schema.columns else "response"
    answer = turns_or_text(record, role)
    if record.schema.plain and isinstance(answer, str):
        prompt = turns_or_text(record, "prompt")
        if isinstance(prompt, str):
            if not answer.strip():
                raise NoSample(f"nothing in {record.name(role)}")
            return Rated(prompt, answer, good, row.file, row.line)
    before, turns = _before(record), as_assistant(answer)
    check_turns((*before, *turns))
    return Rated(before, turns, good, row.file, row.line, tools(record))


def _before(record: Record) -> tuple[Message, ...]:
    """Return the turns before an answer, from messages or from the columns of a request."""
    if "messages" in record.schema.columns:
        return said(record)
    if "prompt" not in record.schema.columns:
        raise BadRow("chosen and rejected are no whole conversations, and there is no prompt")
    prompt = record.value("prompt")
    if prompt is None or isinstance(prompt, str):
        return asked(record)
    return led(record, as_user(turns_or_text(record, "prompt")))


def _parted(
    better: tuple[Message, ...], worse: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Return the turns that two conversations share, and what is left of each."""
    shared = 0
    while better[shared : shared + 1] == worse[shared : shared + 1] != ():
        shared += 1
    rest = better[shared:], worse[shared:]
    if any(not turns or turns[0].role != "assistant" for turns in rest):
        raise BadRow("chosen and rejected differ in more than the answer")
    return better[:shared], *rest


def _refuse_equal(equal: bool) -> None:
    if equal:
        raise NoSample("chosen and rejected are the same")


def _judgement(record: Record) -> bool:
    value: Any = record.value("kto_tag")
    if value is None or value == "":
        raise NoSample(f"no judgement in {record.name('kto_tag')}")
    good = judgement(value)
    if good is None:
        raise BadRow(f"{record.name('kto_tag')} holds {described(value)}, not true or false")
    return good


def judgement(value: Any) -> bool | None:
    """Return what true, false, 1, 0 and their spellings stand for, or None."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return JUDGEMENTS.get(value.strip().lower()) if isinstance(value, str) else None
