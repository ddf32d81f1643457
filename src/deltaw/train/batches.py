"""Encoded examples in batches whose order depends on the seed and the epoch alone."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler

Part = TypeVar("Part")
BUCKET = 50
"""Batches are cut from this many batches' worth of rows sorted by length."""


class EpochSampler(Sampler[int]):
    """A new order of the rows for every epoch, similar lengths side by side if `bucketed`.

    With buckets the short last batch stays last, so that all others are full. With `longest_first`
    the batch of the longest row is the first of all, so that too little memory shows at once.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        bucketed: bool,
        longest_first: bool = False,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.bucketed = bucketed
        self.longest_first = longest_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = _shuffled(len(self.lengths), generator)
        if not self.bucketed:
            return iter(self._started(order, order))
        size = self.batch_size
        span = size * BUCKET
        batches = []
        for start in range(0, len(order), span):
            rows = sorted(order[start : start + span], key=self.lengths.__getitem__)
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        last = [batches.pop()] if len(order) % size else []
        shuffled = _shuffled(len(batches), generator)
        ordered = self._started([batches[i] for i in shuffled], [batches[i][-1] for i in shuffled])
        return iter([row for batch in [*ordered, *last] for row in batch])

    def _started(self, parts: list[Part], longest: Sequence[int]) -> list[Part]:
        """Return the parts, at the very start of training the one with the longest row first."""
        if self.epoch or not self.longest_first or not parts:
            return parts
        first = max(range(len(parts)), key=lambda index: self.lengths[longest[index]])
        return [parts[first], *parts[:first], *parts[first + 1 :]]


class SteadyBatches(EpochSampler):
    """A new order of the batches for every epoch; neighbouring rows are one batch and stay so.

    The short last batch stays last.
    """

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows, size = range(len(self.lengths)), self.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        last = [batches.pop()] if len(rows) % size else []
        shuffled = _shuffled(len(batches), generator)
        longest = [max(batches[i], key=self.lengths.__getitem__) for i in shuffled]
        ordered = self._started([batches[i] for i in shuffled], longest)
        return iter([row for batch in [*ordered, *last] for row in batch])


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    """Return the numbers below `count` in a random order."""
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def padded_tokens(order: EpochSampler, lengths: Sequence[int] | None = None) -> list[int]:
    """Return how many tokens each batch of an epoch has, with its padding.

    `lengths` are those of the rows where the order goes by others.
    """
    rows, size = list(order), order.batch_size
    every = order.lengths if lengths is None else lengths
    batches = [[every[i] for i in rows[at : at + size]] for at in range(0, len(rows), size)]
    return [max(batch) * len(batch) for batch in batches]


class Collator:
    """Pads encoded rows to the longest of their batch."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and masks of shape (rows, longest) and `labels` of shape (rows,)."""
        texts = [{key: row[key] for key in row if key != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(texts, padding=True, return_tensors="pt"))
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=dtype)
        return batch
