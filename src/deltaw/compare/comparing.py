"""From a recipe and methods to every run, a table, a JSON and a report."""

import json
import os
import platform
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaw.compare import record as records
from deltaw.compare.examining import Rates, choose_rates, examine
from deltaw.compare.folder import clear, refuse_foreign
from deltaw.compare.methods import Methods, recipes
from deltaw.compare.processes import Pool
from deltaw.compare.record import Record
from deltaw.compare.running import Runs
from deltaw.errors import ConfigError, raise_all
from deltaw.train.choices import by_name
from deltaw.train.console import Console
from deltaw.train.data.dataset import Data
from deltaw.train.effects import refuse_unread
from deltaw.train.interrupt import Interrupt
from deltaw.train.locking import held
from deltaw.train.reading import read
from deltaw.train.receipt import show_data
from deltaw.train.recipe import LANGUAGE_TASKS, Recipe
from deltaw.train.runfolder import default_path

SPLITTING = ("seed", "split_seed", "test_share")
"""Keys without which the data would be split by what `_shared` says."""
TEST_SHARE = 0.2
"""What is held out as the test part of data that have none."""


def compare(
    values: Mapping[str, Any],
    methods: Methods,
    *,
    seeds: int = 5,
    rates: Rates = "auto",
    output: Path | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    leave_out: bool = False,
) -> Path:
    """Run all methods on the recipe of `values` and return the folder of what was found.

    The rates of each method are searched alike on the validation part with the first seed; then
    every seed is trained at the best one and scored on the test part. All runs share one split.
    What was done before in the same folder is not done again. With `leave_out` methods that this
    model cannot have are left out, and named.

    Raises:
        DeltawError: whatever is wrong, with any of the methods, before the first run.
        Stopped: on Ctrl-C or SIGTERM; the same call goes on.
    """
    console = Console()
    shared = _shared(values)
    made = recipes(shared, methods)
    first = next(iter(made.values()))
    folder = output or _default(first)
    data = read(first)
    refuse_unread(first, data.schema.task)
    _require(data, rates)
    with Interrupt() as interrupt, held(folder, partial(refuse_foreign, folder)):
        fresh = Record(
            shared=_recorded(shared),
            data=by_name(data.hashes),
            methods=_as_read(methods),
            compared=list(methods),
            machine=_machine(jobs),
            seeds=[first.seed + index for index in range(seeds)],
        )
        record = records.joined(None if overwrite else records.read(folder), fresh, folder)
        show_data(console, data)
        pool = Pool(jobs, max(1, (os.cpu_count() or 1) // jobs), interrupt)
        interrupt.waiting = True
        try:
            examine(record, made, folder, pool, console, leave_out=leave_out)
            choose_rates(record, rates)
            if overwrite:
                clear(folder)
            runs = Runs(record, made, folder, console)
            runs.announce()
            runs.finish(pool, len(data.test))
        finally:
            pool.stop()
            interrupt.waiting = False
    return folder


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values that all methods share."""
    shared = {
        key: value
        for key, value in values.items()
        if key not in ("record", "output") and not (key in SPLITTING and value is None)
    }
    if shared.get("task") in LANGUAGE_TASKS:
        raise ConfigError(
            f"task={shared['task']}: only classification and regression can be compared so far.\n"
            "Fix: train each method with deltaw train, and compare their loss on held-out rows."
        )
    if "learning_rate" in shared:
        raise ConfigError(
            f"The recipe sets learning_rate={shared['learning_rate']}, which would favour the "
            "methods that it suits.\nFix: leave it out, and say with --lr which rates are tried: "
            f"auto, rule, or numbers such as --lr {shared['learning_rate']}."
        )
    shared.setdefault("test_share", TEST_SHARE)
    shared.setdefault("split_seed", shared.get("seed", 0))
    return shared


def _recorded(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared values that decide the scores; places by their names alone."""
    free = ("name", "report_to", "trust_remote_code")
    places = {key: str(shared[key]) for key in ("model", "data")}
    names = {key: Path(at).name if Path(at).exists() else at for key, at in places.items()}
    return _as_read({key: value for key, value in shared.items() if key not in free} | names)


def _as_read(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they come back from a JSON file, where every key is text."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


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


def _require(data: Data, rates: Rates) -> None:
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
