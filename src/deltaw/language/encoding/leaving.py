"""What cannot be trained on, and what templates leave out of what is."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.language.data.samples import Message
from deltaw.train.data.rows import Skip, place

FEW = 5
"""Rows with the same problem that are named one by one."""


def joined(text: str) -> str:
    """Return a text without its blanks, which templates set as they like."""
    return "".join(text.split())


def unsaid(text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a turn that is no answer, or the name of a tool, is not in a rendered text.

    Blanks are as the template likes, and a text may be written as in JSON.
    """
    inside = joined(text)
    words = [message.content for message in messages if message.role != "assistant"]
    words += [tool["function"]["name"] for tool in tools]
    return not all(joined(w) in inside or joined(_escaped(w)) in inside for w in words)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def gathered(problems: Sequence[Skip], rows: int) -> list[str]:
    """Return a line for each of the `rows` with problems, as both answers of a pair may have one.

    What many rows share, as by a template, is said once.
    """
    reasons = defaultdict(list)
    for problem in problems:
        reasons[problem.file, problem.line].append(problem.reason)
    shared = defaultdict(list)
    for where, own in reasons.items():
        reason = "; ".join(dict.fromkeys(own))
        shared[reason].append(Skip(*where, reason))
    lines = []
    for some in shared.values():
        if len(some) <= FEW:
            lines += [str(problem) for problem in some]
        else:
            more = f"and {len(some) - 1:,} more of {rows:,} rows"
            lines.append(f"{place(some[0].file, some[0].line)} {more}: {some[0].reason}")
    return lines
