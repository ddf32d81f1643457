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
    record: Record,
    made: Mapping[str, Recipe],
    folder: Path,
    pool: Pool,
    console: Console,
    *,
    leave_out: bool = False,
) -> None:
    """Prepare every method that is new to the record, and note what is known before its first step.

    With `leave_out` methods that cannot be run are left out while there are others.

    Raises:
        RunError: listing every method that cannot be run, or if the model at hand is another than
            that of the record in `folder`.
    """
    new = [title for title in record.compared if title not in record.examined]
    found, problems = _done(worker.examine, {title: made[title] for title in new}, pool, console)
    others = len(problems) < len(record.compared)
    raise_all(
        RunError,
        "These methods cannot be compared:",
        [] if leave_out and others else [f"{printable(t)}: {why}" for t, why in problems.items()],
        f"see each, or leave {', '.join(map(printable, problems))} out of --methods."
        if others
        else "",
    )
    seen = found or _identified(made[record.compared[0]], pool, console)
    require_same_base(record, list(seen.values()), folder)
    for title, why in problems.items():
        console.field("left out", f"{printable(title)}: {why.splitlines()[0]}")
        record.compared.remove(title)
        del record.methods[title]
    record.examined |= found
    said: dict[str, list[str]] = {}
    for title in found:
        for warning in found[title]["warnings"]:
            said.setdefault(warning, []).append(printable(title))
    for warning, titles in said.items():
        console.field("warning", f"{warning}\n({', '.join(titles)})")


def _identified(recipe: Recipe, pool: Pool, console: Console) -> dict[str, dict[str, Any]]:
    """Return what the model at hand is, of which no method had to be looked at."""
    found, problems = _done(worker.identify, {"the model": recipe}, pool, console)
    raise_all(RunError, "The model cannot be compared with the record's:", list(problems.values()))
    return found


def _done(
    look: Work, recipes: Mapping[str, Recipe], pool: Pool, console: Console
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Look at all recipes; return what was seen by name, and why what could not be."""
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    waiting, count = list(recipes), len(recipes)
    with closing(Progress(console, "looking at", count, count, 0, 0.0)) as progress:
        while waiting or pool.tasks:
            while waiting and not pool.full:
                name = waiting.pop(0)
                pool.start(name, look, plain(recipes[name]))
                progress.begin(name, Running(1.0))
            for task in pool.ended():
                kind, value = task.outcome()
                if kind == "done":
                    found[task.name] = value
                    progress.done(task.name, value.get("adapted", "base and tokenizer are read"))
                else:
                    problems[task.name] = value or kind
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
