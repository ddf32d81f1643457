"""Estimates of memory beside measured peaks, as rows of a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import digits, table

HEADER = ("model", "", "method", "batch", "estimate, MB", "peak, MB", "estimate / peak")


@dataclass(frozen=True)
class Compared:
    """A case, its estimate, and the median of its peaks, in bytes."""

    case: str
    estimate: float
    peak: float

    @property
    def ratio(self) -> float:
        """The estimate over the peak."""
        return self.estimate / self.peak

    def row(self, fitted: Sequence[str], otherwise: str) -> tuple[str, ...]:
        """Return its row; shapes that are not `fitted` are called `otherwise`."""
        shape, method, batch, *flags = self.case.split("/")
        return (
            shape,
            "fitted" if shape in fitted else otherwise,
            ", ".join([method, *flags]),
            batch.replace("x", " x "),
            digits(self.estimate / 1e6),
            digits(self.peak / 1e6),
            f"{self.ratio:.3f}",
        )


def compared(results: Results, cases: Sequence[str]) -> list[Compared]:
    """Return the cases that have both an estimate and a peak."""
    found = []
    for case in cases:
        measured, known = peaks(results, case), results.entries.get(f"estimate/{case}")
        if measured and known:
            found.append(Compared(case, known["total"], statistics.median(measured)))
    return found


def peaks(results: Results, case: str) -> list[float]:
    """Return the peaks of a case in all rounds."""
    return list(rounds.values(results, case, "peak").values())


def worst(found: Sequence[Compared]) -> float:
    """Return the largest error of an estimate, as a share of the peak."""
    return max((abs(one.ratio - 1) for one in found), default=0.0)


def as_table(found: Sequence[Compared], fitted: Sequence[str], otherwise: str) -> str:
    """Return the table of all cases."""
    return table(HEADER, [one.row(fitted, otherwise) for one in found])
