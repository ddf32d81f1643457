"""BLEU, by sacrebleu."""

import numpy as np
from sacrebleu.metrics import BLEU

from deltaw.language.metrics.tally import Answers, References, Tally, each
from deltaw.language.metrics.words import Words

LONGEST = 4
"""Words of the longest n-grams."""


def bleu(
    answers: Answers, references: References, words: Words, *, lowercase: bool = False
) -> Tally:
    """Return what BLEU counts: `100 · min(1, e^(1 - r/c)) · (Π_n matches_n / n-grams_n)^(1/4)`.

    A match is an n-gram of the answer that a reference has as often; r sums the lengths of the
    references closest to the answers, whose lengths sum to c.

    Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation".
    """
    # Its effective order is what sacrebleu wants for single rows; it changes none of the counts.
    metric = BLEU(tokenize=words.tokenizer, lowercase=lowercase, effective_order=True)
    found = [
        metric.sentence_score(answer, list(texts))
        for answer, texts in zip(answers, references, strict=True)
    ]
    counts = [[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in found]
    return Tally(np.array(counts, np.float64), each(_score))


def _score(sums: list[float]) -> float:
    answer, reference, *grams = map(int, sums)
    matches, totals = grams[:LONGEST], grams[LONGEST:]
    return BLEU.compute_bleu(matches, totals, answer, reference, smooth_method="exp").score
