"""Exact match: the share of answers that are a reference."""

from deltaw.language.metrics.tally import Answers, References, Tally, mean_of


def exact_match(answers: Answers, references: References) -> Tally:
    """Return what exact match counts: answers equal to a reference, the width of blanks aside."""
    return mean_of(
        [
            float(_blanks(answer) in map(_blanks, texts))
            for answer, texts in zip(answers, references, strict=True)
        ]
    )


def _blanks(text: str) -> str:
    return " ".join(text.split())
