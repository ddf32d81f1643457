"""The three measured constants of the memory estimate: those whose estimates lie nearest to peaks.

Peaks of the fitted shapes alone count, as the two benchmarks of the estimate measured them. Every
combination on a grid is tried on what the rehearsed runs allocate.
"""

import importlib
import itertools
import math
import multiprocessing
import statistics
from typing import Any

from benchmarks import estimates, memory_estimate, train_memory
from benchmarks.results import Results
from benchmarks.tables import table

TITLE = "Constants of the memory estimate"
QUICK = False
FITTED = memory_estimate.FITTED
NODES = tuple(n / 20 for n in range(10))
SAVED = tuple(n / 20 for n in range(10, 30))
RUNTIME = range(0, 65, 5)
"""What torch and a trainer make once, in MiB; `deltaw train` has it before it reads the weights."""
SHOWN = 5


def run(results: Results) -> None:
    """Compute the error of every combination, by the code and the peaks that there are."""
    spied: Any = importlib.import_module("deltaw.analysis.memory.estimate")
    cases = []
    for module, by_trainer in ((memory_estimate, True), (train_memory, False)):
        peaks = Results(module.__name__.rpartition(".")[2])
        for case in module.CASES:
            if case.split("/")[0] in FITTED:
                measured = statistics.median(estimates.peaks(peaks, case))
                cases.append((_record(spied, module.guess, case), measured, by_trainer))
    grid = list(itertools.product(NODES, SAVED))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        tasks = [(nodes, saved, cases) for nodes, saved in grid]
        for (nodes, saved), (error, runtime) in zip(grid, pool.imap(_least, tasks), strict=True):
            key = f"NODES={nodes:g}/SAVED={saved:g}"
            results.add(key, {"error": error, "runtime": runtime, "cases": len(cases)})


def _record(spied: Any, guess: Any, case: str) -> Any:
    """Return what the rehearsal of a case recorded."""
    found = []
    real = spied.peak

    def noting(record: Any) -> dict[str, int]:
        found.append(record)
        return real(record)

    spied.peak = noting
    try:
        guess(case)
    finally:
        spied.peak = real
    (record,) = found
    return record


def _least(task: tuple[float, float, list[tuple[Any, float, bool]]]) -> tuple[float, int]:
    """Return the least error that any runtime has, and that runtime in MiB."""
    peak: Any = importlib.import_module("deltaw.analysis.memory.peak")
    peak.NODES, peak.SAVED, cases = task
    totals = [sum(peak.peak(record).values()) for record, _, _ in cases]

    def error(runtime: int) -> float:
        logs = [
            math.log((total + by_trainer * (runtime << 20)) / measured)
            for total, (_, measured, by_trainer) in zip(totals, cases, strict=True)
        ]
        return math.sqrt(statistics.fmean(log * log for log in logs))

    return min((error(runtime), runtime) for runtime in RUNTIME)


def ranked(results: Results) -> list[tuple[float, float, float, int]]:
    """Return (error, NODES, SAVED, RUNTIME in MiB), the least error first."""
    found = []
    for key, entry in results.entries.items():
        nodes, saved = (float(part.partition("=")[2]) for part in key.split("/"))
        found.append((entry["error"], nodes, saved, entry["runtime"]))
    return sorted(found)


def report(results: Results) -> str:
    """Return the best combinations."""
    cases = next(iter(results.entries.values()))["cases"]
    rows = [
        (f"{nodes:g}", f"{saved:g}", f"{runtime}", f"{error:.2%}")
        for error, nodes, saved, runtime in ranked(results)[:SHOWN]
    ]
    return (
        f"The best {SHOWN} of {len(results.entries)} combinations, each with its best RUNTIME, by "
        f"the root mean square of the logarithm of estimate / peak over the {cases} cases of "
        f"{' and '.join(FITTED)} in the tables of estimates on this page; no other shape counts. "
        "The code has the first row.\n\n" + table(("NODES", "SAVED", "RUNTIME, MiB", "error"), rows)
    )
