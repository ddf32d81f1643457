"""Where the answers stand in the text of a conversation, whatever its template is.

A template that marks answers (`{% generation %}`) is believed. Otherwise a conversation is rendered
up to an answer and with it, and what is new is the answer; a template that rewrites what came
before is asked again with the answer replaced by a word that occurs nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.language.data.samples import Message
from deltaw.language.encoding.calling import as_data
from deltaw.language.encoding.leaving import joined
from deltaw.train.rendering import Span, Template
from deltaw.train.sandbox import Refused

STAND_IN = "\ufdd2"


def trained(message: Message) -> bool:
    """Tell whether a message is learnt: the model's own ones that the row does not leave out."""
    return message.role == "assistant" and message.learnt


def answers(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    ends: Sequence[str] = (),
    *,
    last: bool = False,
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the span of each answer that is learnt, or the `last`.

    A span begins after the words that prompt for it and ends with the last of `ends` (the words
    that end a turn) that follows its content, blanks after that left out.

    Raises:
        Refused: if the template raises, or an answer that is learnt is not in the text as the row
            has it, blanks aside.
    """
    for index, message in enumerate(messages):
        if message.role != "assistant" and message.trained:
            raise Refused(
                f"turn {index + 1} is to be learnt by its row and is no answer; train_on=all "
                "learns every turn"
            )
    data = as_data(messages, template)
    text, marked = template.render(data, tools)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    believed = dict(zip(turns, marked, strict=True)) if len(marked) == len(turns) else {}
    learnt = [index for index in turns if trained(messages[index])]
    kept = []
    for index in learnt[-1:] if last else learnt:
        span = believed.get(index) or _span(template, data, tools, text, index)
        if not _stands(text, span, messages[index]):
            fix = "" if index == learnt[-1] else "; train_on=last learns the last answer alone"
            raise Refused(f"turn {index + 1} is changed or left out by the template{fix}")
        kept.append(_ended(text, span, ends))
    return text, kept


def everything(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and all spans of it but the turns that the row leaves out.

    Raises:
        Refused: if the template raises, or a turn that is left out cannot be found.
    """
    data = as_data(messages, template)
    text, _ = template.render(data, tools)
    kept, start = [], 0
    for index, message in enumerate(messages):
        if message.trained is False:
            begin, end = _span(template, data, tools, text, index)
            kept.append((start, begin))
            start = end
    return text, [*kept, (start, len(text))]


def _span(
    template: Template,
    data: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    index: int,
) -> Span:
    before = _rendered(template, data[:index], tools, prompt=data[index]["role"] == "assistant")
    until = _rendered(template, data[: index + 1], tools)
    if before is not None and until and until.startswith(before) and text.startswith(until):
        return len(before), len(until)
    plain = {"role": data[index]["role"], "content": STAND_IN}
    for turn in (plain, {**data[index], "content": STAND_IN}):
        head, found, tail = _parted(template, [*data[:index], turn, *data[index + 1 :]], tools)
        if found and text.startswith(head) and text.endswith(tail):
            return len(head), len(text) - len(tail)
    if index and (span := _behind(template, data, tools, text, index)):
        return span
    raise Refused(
        f"turn {index + 1} cannot be found in what the template makes of the whole conversation"
    )


def _behind(
    template: Template,
    data: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    index: int,
) -> Span | None:
    """Return where an answer stands by what is written behind the content of the turn before.

    It finds the answers of templates that write ahead of the last question, as the tools.
    """
    asked = [*data[: index - 1], {**data[index - 1], "content": STAND_IN}]
    _, found, before = _parted(template, asked, tools, prompt=True)
    _, _, until = _parted(template, [*asked, data[index]], tools)
    _, _, whole = _parted(template, [*asked, *data[index:]], tools)
    if not (found and until.startswith(before) and whole.startswith(until)):
        return None
    start = len(text) - len(whole)
    fits = text.endswith(whole) and len(until) > len(before)
    return (start + len(before), start + len(until)) if fits else None


def _parted(
    template: Template,
    data: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
) -> tuple[str, str, str]:
    """Return what is written before the stand-in and behind it; nothing where it is refused."""
    return (_rendered(template, data, tools, prompt=prompt) or "").partition(STAND_IN)


def _rendered(
    template: Template,
    data: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
) -> str | None:
    """Return what a template makes of a part of a conversation, or None where it refuses that."""
    try:
        return template.render(data, tools, prompt=prompt)[0]
    except Refused:
        return None


def _stands(text: str, span: Span, message: Message) -> bool:
    """Tell whether the answer, and each call of a tool, stands in its span."""
    inside = joined(text[slice(*span)])
    parts = [message.content, *(call["function"]["name"] for call in message.tool_calls)]
    return all(joined(part) in inside for part in parts)


def turn_end(template: Template) -> str:
    """Return what a template writes behind an answer."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}]
    try:
        text, _ = template.render(turns)
    except Refused:
        return ""
    return text.partition(STAND_IN)[2]


def _ended(text: str, span: Span, ends: Sequence[str]) -> Span:
    start, stop = span
    for end in ends:
        if text[start:stop].rstrip().endswith(end):
            return start, start + len(text[start:stop].rstrip())
        if text.startswith(end, stop):
            return start, stop + len(end)
    return start, stop
