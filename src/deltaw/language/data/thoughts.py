"""Thoughts that stand in answers, for models that are not to think before they answer."""

import re
from dataclasses import replace

from deltaw.language.data.record import NoSample
from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Message,
    Passage,
    Preference,
    Rated,
    Sample,
    Turns,
)
from deltaw.train.data.wording import counted

END = "</think>"
THOUGHT = re.compile(f"<think>.*?{END}", re.DOTALL)
OPENED = re.compile(
    rf"\A(?:(?!<think>).)*?(?:\A|(?<=\n)){END}|\A(?:(?!<think>).)*?{END}(?=\n|\Z)", re.DOTALL
)
"""A thought at the beginning that the prompt has opened; its end stands at that of a line."""


def without_thoughts(sample: Sample) -> tuple[Sample, int]:
    """Return a sample without the thoughts in its answers, and how many answers had some.

    Source: what LLaMA-Factory does with `enable_thinking: false` (`ReasoningTemplate`).

    Raises:
        NoSample: if an answer is nothing but thoughts, or two differ in nothing else.
    """
    match sample:
        case Conversation():
            messages, count = _said(sample.messages)
            return replace(sample, messages=messages), count
        case Completion():
            rest = _left(sample.completion)
            return replace(sample, completion=rest), int(rest != sample.completion)
        case Rated():
            (prompt, before), (answer, count) = _prompt(sample.prompt), _answer(sample.completion)
            return replace(sample, prompt=prompt, completion=answer), before + count
        case Preference():
            prompt, before = _prompt(sample.prompt)
            (chosen, first), (rejected, second) = _answer(sample.chosen), _answer(sample.rejected)
            if chosen == rejected:
                raise NoSample("chosen and rejected are the same but for their thoughts")
            changed = replace(sample, prompt=prompt, chosen=chosen, rejected=rejected)
            return changed, before + first + second
        case Passage():
            return sample, 0


def left_out(count: int) -> list[str]:
    """Say of how many answers thoughts were left out, if of any."""
    said = f"the thoughts in {counted(count, 'answer')} are left out (enable_thinking=false)"
    return [said] if count else []


def spoken(text: str) -> str:
    """Return an answer without its thoughts; one may begin with a thought that is only ended."""
    rest = THOUGHT.sub("", OPENED.sub("", text))
    return text if rest == text else rest.lstrip("\n")


def _prompt(prompt: Turns) -> tuple[Turns, int]:
    return (prompt, 0) if isinstance(prompt, str) else _said(prompt)


def _answer(answer: Turns) -> tuple[Turns, int]:
    if not isinstance(answer, str):
        return _said(answer)
    rest = _left(answer)
    return rest, int(rest != answer)


def _said(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], int]:
    """Return turns without the thoughts of the assistant, and how many turns had some."""
    found = tuple(
        replace(turn, content=_left(turn.content, calls=bool(turn.tool_calls)))
        if turn.role == "assistant"
        else turn
        for turn in messages
    )
    return found, sum(new != old for new, old in zip(found, messages, strict=True))


def _left(text: str, *, calls: bool = False) -> str:
    rest = spoken(text)
    if rest != text and not (rest.strip() or calls):
        raise NoSample("an answer is nothing but thoughts, which enable_thinking=false leaves out")
    return rest
