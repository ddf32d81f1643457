"""Pairs or ratings, by what the samples are."""

from collections.abc import Sequence
from typing import Any

from deltaw.language.data.samples import Preference, Rated
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.training import pairs, ratings
from deltaw.language.training.judged import Judged


def are_judged(samples: Sequence[Any]) -> bool:
    """Tell whether samples compare or rate answers."""
    return all(isinstance(sample, Preference | Rated) for sample in samples)


def encode(encoder: Encoder, samples: Sequence[Any]) -> Judged:
    """Return preferences or rated answers as tokens.

    Raises:
        ConfigError: where long answers are to be split.
        DataError: listing the samples that the template refuses or leaves without an end.
    """
    if all(isinstance(sample, Preference) for sample in samples):
        return pairs.encode(encoder, samples)
    return ratings.encode(encoder, samples)
