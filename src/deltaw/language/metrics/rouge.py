"""ROUGE-L: how much of the longest common subsequence of words there is in both texts."""

from collections import defaultdict
from collections.abc import Sequence

from deltaw.language.metrics.tally import Answers, References, Tally, mean_of
from deltaw.language.metrics.words import plain


def rouge_l(answers: Answers, references: References) -> Tally:
    """Return what ROUGE-L counts: the mean over rows of F1 beside the reference that fits best.

    `F1 = 2 l / (words of the answer + words of the reference)`, l the length of their longest
    common subsequence of words, marks and capitals aside.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    return mean_of(
        [
            max(_f1(plain(answer), plain(text)) for text in texts)
            for answer, texts in zip(answers, references, strict=True)
        ]
    )


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    return 2 * common(one, other) / (len(one) + len(other)) if one and other else 0.0


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    The bits of a whole number are a row of the table of lengths: a bit is 0 where the length grows.

    Source: Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited".
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(one):
        places[word] |= 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        hit = row & places[word]
        row = ((row + hit) | (row - hit)) & whole
    return len(one) - row.bit_count()
