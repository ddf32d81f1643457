"""What a word is: in texts without blanks between words, a character."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

KANA = r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d"
HAN = r"\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA, _CHARACTER = re.compile(f"[{KANA}]"), re.compile(f"[{KANA}{HAN}]")
_PLAIN = re.compile(rf"[{KANA}{HAN}]|(?:(?![{KANA}{HAN}])[^\W_])+")
ENOUGH = 0.2
"""The share of letters from which on a text counts as one without blanks; a word has about five."""
JAPANESE = 0.1
"""The share of kana among such letters from which on a text counts as Japanese."""
CUTTERS = {"13a": Tokenizer13a(), "zh": TokenizerZh(), "char": TokenizerChar()}


@dataclass(frozen=True, slots=True)
class Words:
    """How texts are cut into words: by one of sacrebleu's tokenizers."""

    tokenizer: Literal["13a", "zh", "char"] = "13a"

    def __str__(self) -> str:
        what = "words" if self.tokenizer == "13a" else "characters"
        return f"{what}, as sacrebleu's tokenizer {self.tokenizer} has them"

    def cut(self, text: str) -> list[str]:
        """Return the words and marks of a text."""
        return CUTTERS[self.tokenizer](text.strip()).split()


def choose(references: Iterable[Iterable[str]]) -> Words:
    """Return how texts like these are cut: by characters where a fifth of the letters is CJK."""
    text = "".join(part for row in references for part in row)
    letters = sum(map(str.isalpha, text))
    characters = len(_CHARACTER.findall(text))
    if characters < ENOUGH * letters or not characters:
        return Words("13a")
    return Words("char" if len(_KANA.findall(text)) >= JAPANESE * characters else "zh")


def plain(text: str) -> list[str]:
    """Return the words, no marks or capitals; a character of Chinese or Japanese is a word."""
    return _PLAIN.findall(text.lower())
