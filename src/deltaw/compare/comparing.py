"""From a recipe and methods to every run, a table, a JSON and a report."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaw.compare import record as records
from deltaw.compare import report, summary, table, worker
from deltaw.compare.methods import Methods, recipes
from deltaw.compare.processes import Pool, Task
from deltaw.compare.progress import Progress, Running
from deltaw.compare.record import FILE, Record
from deltaw.compare.search import Standing, Trial, count, planned, rungs, standing
from deltaw.errors import ConfigError, RunError, raise_all
from deltaw.train import staging
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.interrupt import Interrupt, Stopped
from deltaw.train.locking import LOCK, lock
from deltaw.train.model import full_name
from deltaw.train.prepare import full_data_name, read
from deltaw.train.receipt import show_data
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import LOG, default_path

TEST_SHARE = 0.2
"""What is held out as the test part of data that have none."""
SPREAD = 4.0
"""From one rate tried to the next."""
RATES = 3
RUNNING = "running"
TABLE = "table.md"
REPORT = "report.html"

Rates = str | tuple[float, ...]
"""`auto` searches around the rule's rate, `rule` takes it, numbers are tried for every method."""


def compare(
    values: Mapping[str, Any],
    methods: Methods,
    *,
    seeds: int = 5,
    rates: Rates = "auto",
    output: Path | None = None,
    jobs: int = 1,
    overwrite: bool = False,
) -> Path:
    """Run all methods on the recipe of `values` and return the folder of what was found.

    The rates of each method are searched alike on the validation part with the first seed; then
    every seed is trained at the best one and scored on the test part. All runs share one split.
    What was done before in the same folder is not done again.

    Raises:
        DeltawError: whatever is wrong, with any of the methods, before the first run.
        Stopped: on Ctrl-C or SIGTERM; the same call goes on.
    """
    console = Console()
    shared = _shared(values, rates)
    made = recipes(shared, methods)
    first = next(iter(made.values()))
    folder = output or _default(first)
    data = read(first)
    _require(data, rates)
    with Interrupt() as interrupt, _held(folder):
        if overwrite:
            _clear(folder)
        fresh = Record(
            shared=shared | {key: Path(shared[key]).name for key in ("model", "data")},
            data={Path(path).name: digest for path, digest in data.hashes.items()},
            methods=methods,
            compared=list(methods),
            machine=_machine(jobs),
            seeds=[first.seed + index for index in range(seeds)],
        )
        record = records.joined(records.read(folder), fresh, folder)
        show_data(console, data)
        _Comparison(record, made, folder, console, interrupt, rates, jobs, len(data.test)).run()
    return folder


def _shared(values: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """Return the recipe's values that all methods share."""
    own = ("record", "output", "name", "report_to", "trust_remote_code")
    shared = {key: value for key, value in values.items() if key not in own}
    if "learning_rate" in shared:
        raise ConfigError(
            f"The recipe sets learning_rate={shared['learning_rate']}, which would favour the "
            "methods that it suits.\nFix: leave it out, and say with --lr which rates are tried: "
            f"auto, rule, or numbers such as --lr {shared['learning_rate']}."
        )
    shared.setdefault("test_share", TEST_SHARE)
    shared.setdefault("split_seed", shared.get("seed", 0))
    return shared


def _machine(jobs: int) -> dict[str, str]:
    return {
        "deltaw": version("deltaw"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "runs at once": str(jobs),
    }


def _default(recipe: Recipe) -> Path:
    usual = default_path(recipe)
    return usual.with_name(f"compare-{usual.name}")


def _require(data: Any, rates: Rates) -> None:
    searched = rates == "auto" or (not isinstance(rates, str) and len(rates) > 1)
    raise_all(
        ConfigError,
        "The data cannot tell methods apart:",
        [
            *(["there is no test part"] if not data.test else []),
            *(
                ["rates are chosen on a validation part, and there is none"]
                if searched and not data.validation
                else []
            ),
        ],
        "add the part as a file, or set test_share and validation_share above 0.",
    )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Create and lock the folder of a comparison; leave no empty one behind.

    Raises:
        RunError: if it holds other files, cannot be written, or another process has it.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    except OSError as error:
        raise staging.cannot_write(folder, error) from error
    if found and FILE not in found:
        raise RunError(
            f"{printable(str(folder), 300)} holds other files ({printable(', '.join(found[:3]))}) "
            "and no comparison.\nFix: choose an empty or new folder with --output."
        )
    with lock(folder):
        try:
            yield
        finally:
            if new and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def _clear(folder: Path) -> None:
    for name in (FILE, TABLE, REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / RUNNING, ignore_errors=True)


class _Comparison:
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
        text = table.write(found, self.rows_tested)
        staging.write_text(self.folder / TABLE, text + "\n")
        staging.write_text(self.folder / REPORT, report.write(self.record, found, self.rows_tested))
        shutil.rmtree(self.folder / RUNNING, ignore_errors=True)
        self.console.line()
        self.console.line(text)
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
