"""Every run of a comparison that is left to be done, and what is written of them."""

import shutil
import sys
from collections.abc import Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from textwrap import fill
from typing import Any

from deltaw.compare import record as records
from deltaw.compare import report, summary, table, worker
from deltaw.compare.examining import plain
from deltaw.compare.folder import REPORT, RUNNING, TABLE
from deltaw.compare.processes import Pool
from deltaw.compare.progress import Progress, Running
from deltaw.compare.record import FILE, Record
from deltaw.compare.search import Standing, Trial, count, planned, rungs, standing
from deltaw.errors import RunError, raise_all
from deltaw.train import staging
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import LOG


class Runs:
    """The runs of a record whose methods are examined and whose rates are chosen."""

    def __init__(
        self, record: Record, made: Mapping[str, Recipe], folder: Path, console: Console
    ) -> None:
        self.record = record
        self.made = made
        self.folder = folder
        self.console = console
        self.number = len(record.rates[record.compared[0]])
        self.problems: dict[str, str] = {}

    def announce(self) -> None:
        """Say how much there is to do."""
        record = self.record
        rounds = ", ".join(f"{n} over {share:g} of the steps" for n, share in rungs(self.number))
        shared: dict[str, list[str]] = {}
        for title in record.compared:
            rates = ", ".join(f"{rate:g}" for rate in record.rates[title])
            shared.setdefault(rates, []).append(printable(title))
        lines = [f"{rates} for {', '.join(titles)}" for rates, titles in shared.items()]
        self.console.field("rates", "\n".join(lines))
        search = f"; the rate of each by {rounds}, with seed {record.seeds[0]}" if rounds else ""
        steps = max(record.examined[title]["steps"] for title in record.compared)
        self.console.field(
            "runs",
            f"{self._total()}: {counted(len(record.seeds), 'seed')}, one split{search}\n"
            f"as much as {self._whole():g} full runs of {steps:,} steps",
        )
        self.console.field("folder", printable(str(self.folder), 300))

    def finish(self, pool: Pool, rows_tested: int) -> None:
        """Do every run, and write table, report and record.

        Raises:
            RunError: listing the methods of which a run could not go on, once the others are done.
            Stopped: when a signal came.
        """
        self._write()
        if any(standing.due for standing in self._standings()):
            for name in (TABLE, REPORT):
                (self.folder / name).unlink(missing_ok=True)
        self._run(pool)
        found = summary.summarize(self.record)
        page = report.write(self.record, found, rows_tested)
        staging.write_text(self.folder / TABLE, table.write(found, rows_tested) + "\n")
        staging.write_text(self.folder / REPORT, page)
        self.console.line()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in table.write(found, rows_tested, width).splitlines():
            self.console.line(line if line.startswith("|") or width is None else fill(line, width))
        self.console.line()
        where = printable(str(self.folder), 300)
        self.console.field("saved", f"{where}/{REPORT}, {TABLE} and {FILE}", whole=True)
        raise_all(
            RunError,
            "Runs of these methods could not go on:",
            [f"{printable(title)}: {why}" for title, why in self.problems.items()],
            "see each; what is done is kept, and the same command tries them again.",
        )
        shutil.rmtree(self.folder / RUNNING, ignore_errors=True)

    def _total(self) -> int:
        return count(self.number, len(self.record.seeds)) * len(self.record.compared)

    def _whole(self) -> float:
        return planned(self.number, len(self.record.seeds)) * len(self.record.compared)

    def _standings(self) -> list[Standing]:
        return [
            standing(title, self.record.rates[title], self.record.seeds, self.record.score)
            for title in self.record.compared
            if title not in self.problems
        ]

    def _run(self, pool: Pool) -> None:
        running: dict[str, Trial] = {}
        done = [trial for standing in self._standings() for trial in standing.done]
        weight = sum(trial.share for trial in done)
        progress = Progress(
            self.console, "training", self._total(), self._whole(), len(done), weight
        )
        with closing(progress):
            while True:
                for trial in [trial for standing in self._standings() for trial in standing.due]:
                    if trial.key not in running and not pool.full:
                        running[trial.key] = trial
                        progress.begin(trial.key, self._start(pool, trial))
                if not pool.tasks:
                    return
                for task in pool.ended():
                    trial = running.pop(task.name)
                    progress.done(trial.key, self._ended(trial, *task.outcome()))
                progress.show()

    def _place(self, trial: Trial) -> Path:
        """Return the folder of a run while it lasts."""
        return self.folder / RUNNING / sha256(trial.key.encode()).hexdigest()[:12]

    def _start(self, pool: Pool, trial: Trial) -> Running:
        seen = self.record.examined[trial.method]
        folder = self._place(trial)
        steps = max(1, round(seen["steps"] * trial.share))
        recipe = self.made[trial.method]
        values = plain(recipe) | {
            "output": str(folder),
            "learning_rate": trial.rate,
            "seed": trial.seed,
            "max_steps": steps,
            "eval_every": max(1, round(seen["every"] * trial.share)),
            "metric": self.record.metric,
        }
        if trial.share < 1 <= recipe.warmup:
            values["warmup"] = max(1, round(recipe.warmup * trial.share))
        scored = ("after",) if trial.share == 1.0 else ()
        pool.start(trial.key, worker.run, values, scored)
        return Running(trial.share, steps, folder / LOG)

    def _ended(self, trial: Trial, kind: str, value: Any) -> str:
        """Note what came of a run, and return it as text; what could not go on is kept."""
        changed = records.changed(self.record, [value]) if kind == "done" else []
        if changed:
            shutil.rmtree(self._place(trial), ignore_errors=True)
            kind, value = (
                "refused",
                (
                    f"{' and '.join(changed)} changed since the comparison began.\n"
                    "Fix: restore what was there, or start over with --overwrite."
                ),
            )
        if kind not in ("done", "diverged"):
            self.problems[trial.method] = f"{trial.key}: {value or kind}"
            return "cannot go on"
        entry = value if kind == "done" else {"diverged": value.splitlines()[0]}
        self.record.runs[trial.key] = {**entry, "machine": self.record.machine}
        self._write()
        shutil.rmtree(self._place(trial), ignore_errors=True)
        return _outcome(entry, self.record.metric)

    def _write(self) -> None:
        records.write(self.folder, self.record, summary.summarize(self.record).as_data())


def _outcome(entry: Mapping[str, Any], metric: str) -> str:
    if entry["diverged"]:
        return "diverged"
    if entry["test"] is None:
        return f"validation {metric} {entry['validation']:.4f}"
    return f"test {metric} {entry['test']['values'][metric]:.4f}"
