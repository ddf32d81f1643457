"""When are two samples, or two prompts, the same?"""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Passage,
    Preference,
    Rated,
    Sample,
    Turns,
)
from deltaw.train.data.rows import place

Key = tuple[object, ...]


def content_key(sample: Sample) -> Key:
    """Return what a sample holds, but not the place it comes from nor what it says of losses."""
    match sample:
        case Conversation():
            return _turns(sample.messages), _functions(sample.tools)
        case Completion():
            return sample.prompt, sample.completion
        case Passage():
            return (sample.text,)
        case Preference():
            sides = _turns(sample.chosen), _turns(sample.rejected)
            return _turns(sample.prompt), *sides, _functions(sample.tools)
        case Rated():
            answer = _turns(sample.completion)
            return _turns(sample.prompt), answer, sample.good, _functions(sample.tools)


def prompt_key(sample: Sample) -> Key:
    """Return what a model is asked: all turns before the last; of a passage the text.

    Samples with one prompt and different answers have the same.
    """
    match sample:
        case Conversation():
            return (_turns(sample.messages[:-1]),)
        case Passage():
            return (sample.text,)
        case Completion() | Preference() | Rated():
            return (_turns(sample.prompt),)


def where(sample: Sample) -> str:
    """Return `file:line` of a sample, safe to show."""
    return place(sample.file, sample.line)


def _turns(turns: Turns) -> str | Key:
    if isinstance(turns, str):
        return turns
    return tuple((turn.role, turn.content, _functions(turn.tool_calls)) for turn in turns)


def _functions(functions: Sequence[Mapping[str, Any]]) -> str:
    return repr(functions) if functions else ""
