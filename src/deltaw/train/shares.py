"""The same batches on any number of processes: each computes its share of the rows of a batch.

A process without a row in a short batch computes the batch's first row with weight 0, so that all
take part in every step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from deltaw.train.batches import EpochSampler

WEIGHT = "share"
"""The key of a batch that holds the weight of its loss."""


@dataclass(frozen=True)
class Place:
    """A row, and the weight of its batch: how many rows of the whole one a process has."""

    row: int
    weight: float


class ShareSampler(Sampler[list[Place]]):
    """Every so many rows of `joined` batches of `sampler`, with their weight, 1 for equal shares.

    For a mean over rows the weight is n_p P / n, with n_p of the n rows of a batch in this one of P
    processes, so that the mean over processes is that over all rows. A loss that is divided by what
    all processes count has the weight 1, or 0 without a row.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        process: int,
        processes: int,
        *,
        mean: bool = False,
        joined: int = 1,
    ) -> None:
        self.sampler = sampler
        self.batch_size = sampler.batch_size * joined
        self.drop_last = False
        self.process = process
        self.processes = processes
        self.mean = mean

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        rows = list(self.sampler)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            own = batch[self.process :: self.processes]
            weight = len(own) * self.processes / len(batch) if self.mean else float(bool(own))
            yield [Place(row, weight) for row in own or batch[:1]]


def joined(processes: int, rows: int, batches: int, *, mean: bool) -> int | None:
    """Return how many of the `batches` of a step to join so that each process has a row of them.

    None where there is no such divisor. Means over rows are not joined: short batches count whole.
    """
    most = 1 if mean else batches
    fitting = (n for n in range(1, most + 1) if not batches % n and rows * n >= processes)
    return next(fitting, None)


class _Placed(Dataset[tuple[Any, float]]):
    """Rows by their places."""

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

    return DataLoader(_Placed(rows), batch_sampler=sampler, collate_fn=weighted)
