"""From examples to token numbers, and how long they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaw.errors import DataError
from deltaw.train.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[int] | int | float]
MULTIPLE = 8
QUANTILE = 0.99
BINS = 8
BAR = 30
CHUNK = 1000
# Tokenizers without a limit of their own report an astronomic one.
UNLIMITED = 10**9


@dataclass(frozen=True, slots=True)
class Bin:
    """`count` examples of `first` to `last` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of examples before truncation to `max_length`; `str()` draws the histogram."""

    max_length: int
    longest: int
    share_truncated: float
    histogram: tuple[Bin, ...]

    def __str__(self) -> str:
        most = max(part.count for part in self.histogram)
        width = len(str(self.histogram[-1].last))
        lines = [
            f"{part.first:>{width}}-{part.last:<{width}} "
            f"{'█' * math.ceil(BAR * part.count / most)} {part.count}"
            for part in self.histogram
        ]
        lines.append(
            f"longest {self.longest} tokens, cut at {self.max_length}: "
            f"{self.share_truncated:.1%} of the rows truncated"
        )
        return "\n".join(lines)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    max_length: int | None = None,
    *,
    limit: int | None = None,
) -> tuple[list[Encoded], Lengths]:
    """Return one dict per example (the tokenizer's lists, and `labels` where known) and lengths.

    `limit` is what the model can take beside the tokenizer's own limit. Without `max_length` it is
    the 99th percentile of the lengths, rounded up to a multiple of 8, at most the limit. Of a pair
    the longer text is cut first. Raises `DataError` for no examples, a `max_length` above the limit
    or one that leaves no room for text.
    """
    if not examples:
        raise DataError("no examples to tokenise\nFix: give at least one row.")
    limit = min(limit or UNLIMITED, tokenizer.model_max_length)
    least = tokenizer.num_special_tokens_to_add(pair=examples[0].pair is not None) + 1
    if max_length is not None and not least <= max_length <= limit:
        raise DataError(
            f"max_length is {max_length}\nFix: choose a number from {least} (special tokens and "
            f"one more) to {limit} (the limit of model and tokenizer)."
        )
    rows = _tokenise(tokenizer, examples, None)
    lengths = [_length(row) for row in rows]
    if max_length is None:
        percentile = float(np.quantile(lengths, QUANTILE, method="inverted_cdf"))
        max_length = min(math.ceil(percentile / MULTIPLE) * MULTIPLE, limit)
    long = [index for index, length in enumerate(lengths) if length > max_length]
    cut = _tokenise(tokenizer, [examples[index] for index in long], max_length)
    for index, row in zip(long, cut, strict=True):
        rows[index] = row
    share = len(long) / len(lengths)
    return rows, Lengths(max_length, max(lengths), share, histogram(lengths))


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """Return at most eight bins of one width, a multiple of 8 unless all lengths are small."""
    shortest, longest = min(lengths), max(lengths)
    width = math.ceil((longest - shortest + 1) / BINS)
    if width > MULTIPLE:
        width = math.ceil(width / MULTIPLE) * MULTIPLE
    counts = np.bincount((np.asarray(lengths) - shortest) // width)
    return tuple(
        Bin(shortest + index * width, shortest + (index + 1) * width - 1, int(count))
        for index, count in enumerate(counts)
    )


def _tokenise(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], max_length: int | None
) -> list[Encoded]:
    rows: list[Encoded] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        pairs = [example.pair for example in chunk if example.pair is not None]
        batch = tokenizer(
            [example.text for example in chunk],
            pairs or None,
            truncation=max_length is not None,
            max_length=max_length,
            verbose=False,
        )
        for index, example in enumerate(chunk):
            row: Encoded = {name: values[index] for name, values in batch.items()}
            if example.label is not None:
                row["labels"] = example.label
            rows.append(row)
    return rows


def _length(row: Encoded) -> int:
    ids = row["input_ids"]
    assert isinstance(ids, list)
    return len(ids)
