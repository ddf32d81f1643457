"""The same batches on any number of processes: each computes its share of the rows of a batch.

A process without a row in a short batch computes the batch's first row with weight 0, so that all
take part in every step. A loss that is a mean over rows is the mean over processes only of equal
shares; a batch that has none is computed whole by each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from deltaw.train.batches import EpochSampler
from deltaw.train.recipe import Recipe

WEIGHT = "share"
"""The key of a batch that holds the weight of its loss."""


@dataclass(frozen=True)
class Place:
    """A row, and the weight of the batch that it is in: 0 for one that another process has."""

    row: int
    weight: float


class ShareSampler(Sampler[list[Place]]):
    """Every so many rows of `joined` batches of `sampler`, or all if `equal` shares are not to be.

    The weights are for a loss that is divided by what all processes count, or a mean over `equal`
    shares.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        process: int,
        processes: int,
        *,
        equal: bool = False,
        joined: int = 1,
    ) -> None:
        self.sampler = sampler
        self.batch_size = sampler.batch_size * joined
        self.drop_last = False
        self.process = process
        self.processes = processes
        self.equal = equal

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        rows = list(self.sampler)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            own = batch[self.process :: self.processes]
            if self.equal and len(batch) % self.processes:
                own = batch
            weight = float(bool(own))
            yield [Place(row, weight) for row in own or batch[:1]]


def joined(processes: int, rows: int, batches: int, *, equal: bool) -> int | None:
    """Return how many of the `batches` of a step to join so that each process has a row of them.

    None where there is no such divisor. Means over `equal` shares are not joined: the mean of a
    short batch counts as much as others.
    """
    if equal:
        return None if rows % processes else 1
    fitting = (n for n in range(1, batches + 1) if not batches % n and rows * n >= processes)
    return next(fitting, None)


def most(recipe: Recipe, processes: int) -> int:
    """Return how many processes, of so many at most, can share the batches of a recipe."""
    if recipe.task == "kto" or recipe.updates_in_backward:
        return 1
    rows, batches, equal = recipe.batch_size, recipe.gradient_accumulation, recipe.task == "dpo"
    fitting = (n for n in range(processes, 0, -1) if joined(n, rows, batches, equal=equal))
    return next(fitting, 1)


class _Placed(Dataset[tuple[Any, float]]):
    """Rows by their places."""

    total_dataset_length = 0  # by which accelerate drops rows that it would have repeated

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> tuple[Any, float]:
        return self.rows[place.row], place.weight


def loader(
    rows: Any, sampler: ShareSampler, collate: Callable[[list[Any]], dict[str, Any]]
) -> DataLoader[Any]:
    """Return what yields this process's batches, with the weight of each."""

    def weighted(items: list[tuple[Any, float]]) -> dict[str, Any]:
        return {**collate([row for row, _ in items]), WEIGHT: items[0][1]}

    return DataLoader(
        _Placed(rows),
        batch_sampler=sampler,
        collate_fn=weighted,
        pin_memory=torch.cuda.is_available(),
    )
