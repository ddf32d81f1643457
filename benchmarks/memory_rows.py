"""Rows for runs whose memory is measured: as many tokens as asked, of every kind of data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = ("the", "old", "man", "went", "down", "to", "the", "sea", "and", "looked", "at", "ships")
ANSWER = 32
"""The most words of an answer to a prompt."""


def write(file: Path, count: int, tokens: int, flags: list[str]) -> Path:
    """Write texts longer than `tokens`, of several lengths if `padded`, short ones if `packing`.

    With `labels` they have labels; with `rated` and `pairs` prompts have answers that are judged,
    with `answers` answers alone.
    """
    lines = [json.dumps(row) for row in _rows(count, tokens, flags)]
    file.write_text("\n".join(lines) + "\n")
    return file


def _rows(count: int, tokens: int, flags: list[str]) -> Iterator[dict[str, Any]]:
    for number in range(count):
        size = tokens
        if "packing" in flags:
            size = tokens // 5
        elif "padded" in flags:
            size = tokens // (1 + number % 4)
        text = f"{number} {_text(number, size)}"
        asked, said, other = _text(number, tokens - ANSWER), _text(number, ANSWER), "ships ships"
        if "labels" in flags:
            yield {"text": text, "label": WORDS[number % 3]}
        elif "rated" in flags:
            yield {"prompt": asked, "completion": f"{number} {said}", "label": number % 2 == 0}
        elif "pairs" in flags:
            yield {"prompt": asked, "chosen": f"{number} {said}", "rejected": other}
        elif "answers" in flags:
            yield {"prompt": text, "completion": said}
        else:
            yield {"text": text}


def _text(number: int, words: int) -> str:
    return " ".join(WORDS[(number + n * (1 + number % 5)) % len(WORDS)] for n in range(words))
