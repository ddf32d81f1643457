"""chrF, by sacrebleu."""

import numpy as np
from sacrebleu.metrics import CHRF

from deltaw.language.metrics.tally import Answers, References, Tally, each


def chrf(answers: Answers, references: References) -> Tally:
    """Return what chrF counts: F2 of precision and recall of characters' n-grams up to six, x 100.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    metric = CHRF()
    # What sacrebleu's own resampling goes by; its public scores do not tell their counts.
    counts = [
        metric._extract_corpus_statistics([answer], [[text] for text in texts])[0]
        for answer, texts in zip(answers, references, strict=True)
    ]
    return Tally(
        np.array(counts, np.float64),
        each(lambda sums: float(metric._compute_score_from_stats(sums).score)),
    )
