"""Looking at every method before the first run, and the rates that each one tries."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from deltaw.compare import worker
from deltaw.compare.processes import Pool
from deltaw.compare.progress import Progress, Running
from deltaw.compare.record import Record, require_same_base
from deltaw.errors import RunError, raise_all
from deltaw.train.choices import full_data_name
from deltaw.train.console import Console
from deltaw.train.escape import printable
from deltaw.train.model import full_name
from deltaw.train.recipe import Recipe

SPREAD = 4.0
"""From one rate tried to the next."""
RATES = 3
HIGHEST = 9.0
"""The highest rate tried; a recipe takes them below 10."""

Work = Callable[[worker.Values], dict[str, Any]]
Rates = Literal["auto", "rule"] | tuple[float, ...]
"""`auto` searches around the rule's rate, `rule` takes it, numbers are tried for every method."""


def examine(
    record: Record, made: Mapping[str, Recipe], folder: Path, pool: Pool, console: Console
) -> None:
    """Prepare every method that is new to the record, and note what is known before its first step.

    Where none is new, the model at hand is looked at alone.

    Raises:
        RunError: listing every method that cannot be run, or if the model at hand is another than
            that of the record in `folder`.
    """
    new = [title for title in record.compared if title not in record.examined]
    work = {title: (worker.examine, made[title]) for title in new}
    if not new:
        work = {"the model": (worker.identify, made[record.compared[0]])}
    found, problems = _done(work, pool, console)
    raise_all(RunError, "These methods cannot be compared:", problems)
    require_same_base(record, list(found.values()), folder)
    record.examined |= {title: found[title] for title in new}
    said: dict[str, list[str]] = {}
    for title in new:
        for warning in record.examined[title]["warnings"]:
            said.setdefault(warning, []).append(printable(title))
    for warning, titles in said.items():
        console.field("warning", f"{warning}\n({', '.join(titles)})")


def _done(
    work: Mapping[str, tuple[Work, Recipe]], pool: Pool, console: Console
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Do all work, and return what came of it by name, and what could not be done."""
    found: dict[str, dict[str, Any]] = {}
    problems = []
    waiting = list(work)
    with closing(Progress(console, "looking at", len(work), len(work), 0, 0.0)) as progress:
        while waiting or pool.tasks:
            while waiting and not pool.full:
                name = waiting.pop(0)
                look, recipe = work[name]
                pool.start(name, look, plain(recipe))
                progress.begin(name, Running(1.0))
            for task in pool.ended():
                kind, value = task.outcome()
                if kind == "done":
                    found[task.name] = value
                    progress.done(task.name, value.get("adapted", "base and tokenizer are read"))
                else:
                    problems.append(f"{printable(task.name)}: {value or kind}")
                    progress.done(task.name, "cannot be run")
            progress.show()
    return found, problems


def choose_rates(record: Record, rates: Rates) -> None:
    """Note the rates that each method tries."""
    for title in record.compared:
        rule = record.examined[title]["rate"]
        if rates == "auto":
            factors = [SPREAD ** (index - RATES // 2) for index in range(RATES)]
            record.rates[title] = [min(HIGHEST, float(f"{rule * f:.2g}")) for f in factors]
        elif rates == "rule":
            record.rates[title] = [rule]
        else:
            record.rates[title] = sorted(map(float, rates))


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values with its places in full."""
    places = {"model": full_name(recipe.model), "data": full_data_name(recipe.data)}
    return recipe.model_dump(exclude_defaults=True, exclude={"record"}) | places
