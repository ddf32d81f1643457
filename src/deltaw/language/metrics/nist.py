"""NIST, as mteval-v13a computes it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import log, log2

import numpy as np

from deltaw.language.metrics.tally import Answers, Floats, References, Tally
from deltaw.language.metrics.words import Words

LONGEST = 5
"""Words of the longest n-grams."""
BETA = log(0.5) / log(1.5) ** 2
"""So that an answer two thirds as long as its references counts half."""

Gram = tuple[str, ...]


def nist(answers: Answers, references: References, words: Words) -> Tally:
    """Return what NIST counts: `e^(β ln² min(1, c/r)) · Σ_n Σ_matches info / n-grams_n`.

    `info(w₁…wₙ) = log₂(count(w₁…wₙ₋₁) / count(w₁…wₙ))` over all references, capitals aside; c sums
    the lengths of the answers and r the mean lengths of their references.

    Source: Doddington 2002, "Automatic Evaluation of Machine Translation Quality Using N-gram
    Co-Occurrence Statistics".
    """
    cut = [[words.cut(text.lower()) for text in texts] for texts in references]
    known: Counter[Gram] = Counter(gram for texts in cut for text in texts for gram in _grams(text))
    known[()] = sum(len(text) for texts in cut for text in texts)
    rows = [
        _row(words.cut(answer.lower()), texts, known)
        for answer, texts in zip(answers, cut, strict=True)
    ]
    return Tally(np.array(rows), _score)


def _row(
    answer: Sequence[str], texts: Sequence[Sequence[str]], known: Counter[Gram]
) -> list[float]:
    """Return the information matched and the n-grams of every length, and the mean length."""
    most: Counter[Gram] = Counter()
    for text in texts:
        most |= Counter(_grams(text))
    info, total = [0.0] * LONGEST, [0] * LONGEST
    for gram, count in Counter(_grams(answer)).items():
        size = len(gram) - 1
        total[size] += count
        if gram in most:
            info[size] += min(count, most[gram]) * log2(known[gram[:-1]] / known[gram])
    return [*info, *total, sum(map(len, texts)) / len(texts)]


def _score(sums: Floats) -> Floats:
    info, total, reference = sums[..., :LONGEST], sums[..., LONGEST:-1], sums[..., -1]
    gained = np.divide(info, total, out=np.zeros_like(info), where=total > 0).sum(-1)
    ratio = np.minimum(1.0, total[..., 0] / np.maximum(reference, 1e-9))
    with np.errstate(divide="ignore"):
        return gained * np.exp(BETA * np.log(ratio) ** 2)


def _grams(text: Sequence[str]) -> Iterator[Gram]:
    for size in range(1, LONGEST + 1):
        for start in range(len(text) - size + 1):
            yield tuple(text[start : start + size])
