"""Is a recipe's data for a language model or for a classifier? What trains follows from it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.language.data.detect import find, is_language
from deltaw.language.data.reading import read_splits
from deltaw.language.data.sources import resolve
from deltaw.language.reading import request
from deltaw.train.console import Console
from deltaw.train.data.table import read_data
from deltaw.train.job import Job
from deltaw.train.keys import LABELLED, LANGUAGE, PREFERENCES
from deltaw.train.prepare import prepare as prepare_texts
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import train as run


def train(
    recipe: Recipe, *, dry_run: bool = False, overwrite: bool = False, said: str | None = None
) -> Path:
    """Train what the recipe's data are for, and return the run's folder.

    `said` is what there is to say first of the file that the recipe is from.

    Raises:
        DeltawError: whatever is wrong, before anything is written.
        Stopped: on Ctrl-C or SIGTERM, with a checkpoint once training had begun.
    """
    settled = settle(recipe)

    def prepare(recipe: Recipe, console: Console) -> Job:
        if said is not None:
            console.field("recipe", said)
        return preparation(recipe)(recipe, console)

    return run(settled, dry_run=dry_run, overwrite=overwrite, prepare=prepare)


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe with its task where the data are for a language model."""
    task = None if recipe.task is not None else _language_task(recipe)
    if task is None:
        return recipe
    values: dict[str, Any] = recipe.model_dump(exclude_unset=True)
    return parse(values | {"task": task}, "the command, with data that are for a language model")


def preparation(recipe: Recipe, *, compared: bool = False) -> Callable[[Recipe, Console], Job]:
    """Return what makes the job of a settled recipe; methods' memory may be `compared` first."""
    if not recipe.is_language:
        return prepare_texts
    from deltaw.language.memory.weighing import compare, weigh  # imports TRL

    said = compare if compared else weigh
    if recipe.task == "dpo":
        from deltaw.language.training.preferring import prepare as prepare_pairs  # imports TRL

        return partial(prepare_pairs, weigh=said)
    from deltaw.language.training.prepare import prepare  # imports TRL

    return partial(prepare, weigh=said)


def _language_task(recipe: Recipe) -> str | None:
    """Return what the data are for by the recipe's keys and their columns, None for classes."""
    changed = recipe.changed.keys()
    if changed & {*LABELLED}:
        return None
    if changed & {*PREFERENCES}:
        return "dpo"
    several = not Path(recipe.data).exists() and ("," in recipe.data or "#" in recipe.data)
    if several or changed & {*LANGUAGE}:
        (first, *_) = resolve(recipe.data, dataset_dir=request(recipe).dataset_dir)
        splits = read_splits(first.entry, encoding=recipe.encoding)
    else:
        splits = read_data(recipe.data, encoding=recipe.encoding, prose=True)
        if not is_language(splits):
            return None
    if recipe.columns:
        return "dpo" if "chosen" in recipe.columns else "sft"
    schema = find(splits.train)
    return "dpo" if schema is not None and schema.kind == "preference" else "sft"
