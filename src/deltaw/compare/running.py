"""What is left of a comparison to be done: looking at methods, choosing rates, and every run."""

import os
import shutil
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from textwrap import fill
from typing import Any

from deltaw.compare import record as records
from deltaw.compare import report, summary, table, worker
from deltaw.compare.folder import REPORT, RUNNING, TABLE
from deltaw.compare.processes import Pool, Task
from deltaw.compare.progress import Progress, Running
from deltaw.compare.record import FILE, Record
from deltaw.compare.search import Standing, Trial, count, planned, rungs, standing
from deltaw.errors import RunError, raise_all
from deltaw.train import staging
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.interrupt import Interrupt, Stopped
from deltaw.train.model import full_name
from deltaw.train.prepare import full_data_name
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import LOG

SPREAD = 4.0
"""From one rate tried to the next."""
RATES = 3

Rates = str | tuple[float, ...]
"""`auto` searches around the rule's rate, `rule` takes it, numbers are tried for every method."""


class Comparison:
    """One pass through everything that is left to do."""

    def __init__(
        self,
        record: Record,
        made: dict[str, Recipe],
        folder: Path,
        console: Console,
        interrupt: Interrupt,
        rates: Rates,
        jobs: int,
        rows_tested: int,
    ) -> None:
        self.record = record
        self.made = made
        self.folder = folder
        self.console = console
        self.interrupt = interrupt
        self.rates = rates
        self.rows_tested = rows_tested
        self.pool = Pool(jobs, max(1, (os.cpu_count() or 1) // jobs))

    def run(self) -> None:
        """Examine every method, do every run, and write what was found."""
        self.interrupt.waiting = True
        try:
            self._examine()
            self._choose_rates()
            self._announce()
            self._do_runs()
        finally:
            self.pool.stop()
            self.interrupt.waiting = False
        self._write()
        found = summary.summarize(self.record)
        staging.write_text(self.folder / TABLE, table.write(found, self.rows_tested) + "\n")
        staging.write_text(self.folder / REPORT, report.write(self.record, found, self.rows_tested))
        shutil.rmtree(self.folder / RUNNING, ignore_errors=True)
        self.console.line()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in table.write(found, self.rows_tested, width).splitlines():
            self.console.line(line if line.startswith("|") or width is None else fill(line, width))
        self.console.line()
        where = printable(str(self.folder), 300)
        self.console.field("saved", f"{where}/{REPORT}, {TABLE} and {FILE}", whole=True)

    def _examine(self) -> None:
        """Look at every method that is new, all before the first run; raise if any cannot run."""
        new = [title for title in self.record.compared if title not in self.record.examined]
        waiting = list(new)
        problems = []
        with Progress(self.console, "looking at", len(new), len(new), 0, 0.0) as progress:
            while waiting or self.pool.tasks:
                while waiting and not self.pool.full:
                    title = waiting.pop(0)
                    self.pool.start(title, worker.examine, _plain(self.made[title]))
                    progress.begin(title, Running(1.0))
                for task in self._ended(progress):
                    kind, value = task.outcome()
                    if kind == "done":
                        self.record.examined[task.name] = value
                        progress.done(task.name, value["adapted"])
                    else:
                        problems.append(f"{printable(task.name)}: {_reason(kind, value)}")
        raise_all(RunError, "These methods cannot be compared:", problems)
        said: dict[str, list[str]] = {}
        for title in new:
            for warning in self.record.examined[title]["warnings"]:
                said.setdefault(warning, []).append(printable(title))
        for warning, titles in said.items():
            self.console.field("warning", f"{warning}\n({', '.join(titles)})")

    def _choose_rates(self) -> None:
        for title in self.record.compared:
            rule = self.record.examined[title]["rate"]
            if self.rates == "auto":
                self.record.rates[title] = [
                    float(f"{rule * SPREAD ** (index - RATES // 2):.2g}") for index in range(RATES)
                ]
            elif self.rates == "rule":
                self.record.rates[title] = [rule]
            else:
                self.record.rates[title] = sorted(map(float, self.rates))

    def _announce(self) -> None:
        record = self.record
        number = len(record.rates[record.compared[0]])
        rounds = ", ".join(f"{many} over {share:g} of the steps" for many, share in rungs(number))
        shared: dict[str, list[str]] = {}
        for title in record.compared:
            rates = ", ".join(f"{rate:g}" for rate in record.rates[title])
            shared.setdefault(rates, []).append(printable(title))
        lines = [f"{rates} for {', '.join(titles)}" for rates, titles in shared.items()]
        self.console.field("rates", "\n".join(lines))
        search = f"; the rate of each by {rounds}, with seed {record.seeds[0]}" if rounds else ""
        full = planned(number, len(record.seeds)) * len(record.compared)
        steps = max(record.examined[title]["steps"] for title in record.compared)
        self.console.field(
            "runs",
            f"{self._total()}: {counted(len(record.seeds), 'seed')}, one split{search}\n"
            f"as much as {full:g} full runs of {steps:,} steps",
        )
        self.console.field("folder", printable(str(self.folder), 300))

    def _total(self) -> int:
        number = len(self.record.rates[self.record.compared[0]])
        return count(number, len(self.record.seeds)) * len(self.record.compared)

    def _do_runs(self) -> None:
        running: dict[str, Trial] = {}
        done = [trial for standing in self._standings() for trial in standing.done]
        weight = sum(trial.share for trial in done)
        number = len(self.record.rates[self.record.compared[0]])
        whole = planned(number, len(self.record.seeds)) * len(self.record.compared)
        with Progress(
            self.console, "training", self._total(), whole, len(done), weight
        ) as progress:
            while True:
                due = [trial for standing in self._standings() for trial in standing.due]
                for trial in due:
                    if trial.key not in running and not self.pool.full:
                        running[trial.key] = trial
                        progress.begin(trial.key, self._start(trial))
                if not self.pool.tasks:
                    return
                for task in self._ended(progress):
                    trial = running.pop(task.name)
                    entry = self._entry(task)
                    self.record.runs[trial.key] = entry
                    self._write()
                    shutil.rmtree(self._place(trial), ignore_errors=True)
                    progress.done(trial.key, _outcome(entry, self.record.metric))

    def _standings(self) -> list[Standing]:
        return [
            standing(title, self.record.rates[title], self.record.seeds, self.record.score)
            for title in self.record.compared
        ]

    def _place(self, trial: Trial) -> Path:
        """Return the folder of a run while it lasts."""
        return self.folder / RUNNING / sha256(trial.key.encode()).hexdigest()[:12]

    def _start(self, trial: Trial) -> Running:
        seen = self.record.examined[trial.method]
        folder = self._place(trial)
        steps = max(1, round(seen["steps"] * trial.share))
        values = _plain(self.made[trial.method]) | {
            "output": str(folder),
            "learning_rate": trial.rate,
            "seed": trial.seed,
            "max_steps": steps,
            "eval_every": max(1, round(seen["every"] * trial.share)),
            "metric": self.record.metric,
        }
        scored = ("after",) if trial.share == 1.0 else ()
        self.pool.start(trial.key, worker.run, values, scored)
        return Running(trial.share, steps, folder / LOG)

    def _ended(self, progress: Progress) -> list[Task]:
        """Wait a little for tasks to end; stop all of them if a signal came."""
        found = self.pool.ended(0.5)
        progress.show()
        if self.interrupt.number is not None:
            self.pool.stop()
            raise Stopped(
                self.interrupt.number, "Stopped; what is done is kept.\nThe same command goes on."
            )
        return found

    def _entry(self, task: Task) -> dict[str, Any]:
        kind, value = task.outcome()
        if kind == "diverged":
            return {"diverged": value.splitlines()[0]}
        if kind != "done":
            raise RunError(f"{printable(task.name, 200)} cannot go on: {_reason(kind, value)}")
        base = self.record.examined[self.record.compared[0]]["base"]
        if value["base"] != base:
            raise RunError(
                "The base model's weights changed since the comparison began.\n"
                "Fix: restore them, or start over with --overwrite."
            )
        return dict(value)

    def _write(self) -> None:
        records.write(self.folder, self.record, summary.summarize(self.record).as_data())


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values with its places in full."""
    places = {"model": full_name(recipe.model), "data": full_data_name(recipe.data)}
    return recipe.model_dump(exclude_defaults=True, exclude={"record"}) | places


def _reason(kind: str, value: Any) -> str:
    if kind == "crashed":
        return f"a defect, please report it:\n{value}"
    return str(value) if kind == "refused" else kind


def _outcome(entry: Mapping[str, Any], metric: str) -> str:
    if entry["diverged"]:
        return "diverged"
    if entry["test"] is None:
        return f"validation {metric} {entry['validation']:.4f}"
    return f"test {metric} {entry['test']['values'][metric]:.4f}"
