"""From runs to one row for each method."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaw.compare.record import Record
from deltaw.compare.search import DIVERGED, Trial, standing
from deltaw.compare.statistics import Difference, Mean, Scores, mean, paired, proven


@dataclass(frozen=True)
class Row:
    """What was found about one method; costs are medians over its full runs.

    `against_best` and `is_tie` are None for the best method, and where no seed is left to compare.
    A method of which a seed diverged is no tie.
    """

    title: str
    rate: float
    at_edge: bool
    scores: Scores
    score: Mean
    is_best: bool
    against_best: Difference | None
    diverged: int
    trainable: int
    parameters: int
    file_bytes: int
    seconds_per_step: float | None
    peak_bytes: int | None
    is_tie: bool | None


@dataclass(frozen=True)
class Summary:
    """All rows, the best first, what the paired test tells apart, and which methods have no row.

    A method of which a seed diverged comes after those of which none did, and is not tested: its
    other seeds alone would speak for it. `failed` says of titles
    where they diverged; `mixed` tells that runs were made under different conditions.
    """

    metric: str
    rows: list[Row]
    proven: list[tuple[str, str, float]]
    failed: list[tuple[str, str]]
    mixed: bool

    def as_data(self) -> dict[str, Any]:
        """Return it for a file."""
        return asdict(self)


def summarize(record: Record) -> Summary:
    """Return what the finished methods of a comparison came to."""
    finals: dict[str, list[Trial]] = {}
    failed = []
    for title in record.compared:
        rates = record.rates.get(title)
        if rates is None:
            continue
        now = standing(title, rates, record.seeds, record.score)
        if now.due:
            continue
        if any(record.score(trial) != DIVERGED for trial in now.final):
            finals[title] = now.final
        else:
            where = f"in every full run at {now.final[0].rate:g}" if now.final else "at every rate"
            failed.append((title, where))
    scores = {title: _scores(record, trials) for title, trials in finals.items()}
    order = sorted(scores, key=lambda t: (-len(scores[t]), -statistics.fmean(scores[t].values())))
    rows = [_row(record, title, finals[title], scores, order[0]) for title in order]
    whole = {title: scores[title] for title in order if len(scores[title]) == len(record.seeds)}
    runs = [record.runs[trial.key] for trials in finals.values() for trial in trials]
    machines = [run["machine"] for run in runs if "machine" in run]
    mixed = any(machine != machines[0] for machine in machines)
    return Summary(record.metric, rows, proven(whole), failed, mixed)


def _scores(record: Record, trials: Sequence[Trial]) -> dict[int, float]:
    return {
        trial.seed: record.runs[trial.key]["test"]["values"][record.metric]
        for trial in trials
        if not record.runs[trial.key]["diverged"]
    }


def _row(
    record: Record, title: str, trials: Sequence[Trial], scores: dict[str, Scores], best: str
) -> Row:
    entries = [record.runs[trial.key] for trial in trials]
    good = [entry for entry in entries if not entry["diverged"]]
    rates = record.rates[title]
    rate = trials[0].rate
    against = None if title == best else paired(scores[title], scores[best])
    whole = len(good) == len(scores[best]) == len(entries)
    return Row(
        title=title,
        rate=rate,
        at_edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        scores=scores[title],
        score=mean(list(scores[title].values())),
        is_best=title == best,
        against_best=against,
        diverged=len(entries) - len(good),
        trainable=good[0]["trainable"],
        parameters=record.examined[title]["parameters"],
        file_bytes=good[0]["file_bytes"],
        seconds_per_step=_median([entry["seconds_per_step"] for entry in good]),
        peak_bytes=_median([entry["peak_bytes"] for entry in good]),
        is_tie=None if against is None else whole and against.is_tie,
    )


def _median(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return statistics.median_low(known) if known else None
