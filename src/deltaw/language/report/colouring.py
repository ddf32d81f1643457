"""Samples as the model reads them, with what is learnt of them marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any

from rich.console import Console as Terminal
from rich.padding import Padding
from rich.text import Text

from deltaw.errors import printable
from deltaw.language.encoding.encoder import Row
from deltaw.language.encoding.labelling import MASKED

BEGIN, END = "⟦", "⟧"
"""Around what is learnt, where there are no colours."""
LEARNT = "black on green"
HEAD, TAIL = 320, 160
"""Characters that are shown of a long stretch."""
ENDS = 6
"""Stretches that are shown at either end of a sample of many."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """The text of neighbouring tokens which are all learnt, or all not."""

    text: str
    learnt: bool


def stretches(row: Row, tokenizer: Any) -> list[Stretch]:
    """Return the text of a row, special tokens included, parted where learning begins or ends.

    A character of several tokens, of which some are learnt, goes with the later ones.
    """
    whole = _decoded(tokenizer, row.input_ids)
    found = []
    start = stop = 0
    for learnt, labels in groupby(label != MASKED for label in row.labels):
        stop += len(list(labels))
        before = _decoded(tokenizer, row.input_ids[:stop])
        end = len(whole) if stop == len(row.labels) else _common(whole, before)
        found.append(Stretch(whole[start:end], learnt))
        start = end
    return [stretch for stretch in found if stretch.text]


def sides(row: Row, tokenizer: Any) -> list[Stretch]:
    """Return the text of a prompt and of its answer apart, special tokens included."""
    prompt, answer = (_decoded(tokenizer, ids) for ids in (row.input_ids, row.labels))
    return [Stretch(f"{prompt}\n", False), Stretch(answer, True)]


def shortened(parts: Sequence[Stretch]) -> list[Stretch]:
    """Return the stretches with the middle of long ones, and of a long row of them, left out."""
    left = len(parts) - 2 * ENDS
    if left > 0:
        gap = Stretch(f"\n[… {left} more stretches …]\n", False)
        parts = [*parts[:ENDS], gap, *parts[-ENDS:]]
    return [replace(part, text=_short(part.text)) for part in parts]


def bracketed(parts: Sequence[Stretch]) -> str:
    """Return the text with brackets around what is learnt; brackets of its own are spelt out."""
    return "".join(f"{BEGIN}{text}{END}" if learnt else text for text, learnt in _plain(parts))


def show(parts: Sequence[Stretch], indent: str) -> None:
    """Print stretches, what is learnt on green, or in brackets where there are no colours."""
    terminal = Terminal()
    if not has_colours(terminal):
        print("\n".join(indent + line for line in bracketed(parts).split("\n")), flush=True)
        return
    text = Text()
    for part in parts:
        text.append(visible(part.text), LEARNT if part.learnt else None)
    terminal.print(Padding(text, (0, 0, 0, len(indent))), highlight=False)


def legend() -> str:
    """Say how what is learnt can be told."""
    return "on green" if has_colours(Terminal()) else f"in {BEGIN}brackets{END}"


def has_colours(terminal: Terminal) -> bool:
    """Tell whether a terminal shows colours, and may (NO_COLOR)."""
    return terminal.is_terminal and terminal.color_system is not None and not terminal.no_color


def visible(text: str) -> str:
    """Return a text in its own lines, everything else that is invisible spelt out."""
    return "\n".join(printable(line, 10 * len(line) + 1) for line in text.split("\n"))


def _plain(parts: Sequence[Stretch]) -> Iterator[tuple[str, bool]]:
    for part in parts:
        text = visible(part.text)
        for mark in (BEGIN, END):
            text = text.replace(mark, f"\\u{ord(mark):04x}")
        yield text, part.learnt


def _short(text: str) -> str:
    left = len(text) - HEAD - TAIL
    if left < TAIL:
        return text
    return f"{text[:HEAD]} [… {left:,} more characters …] {text[-TAIL:]}"


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
