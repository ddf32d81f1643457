"""Is a recipe's data for a language model or for a classifier? What trains follows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaw.language.data.detect import is_language
from deltaw.train.console import Console
from deltaw.train.data.table import read_data
from deltaw.train.job import Job
from deltaw.train.keys import LABELLED, LANGUAGE
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
    if recipe.task is not None or not _is_language(recipe):
        return recipe
    values: dict[str, Any] = recipe.model_dump(exclude_unset=True)
    return parse(values | {"task": "sft"}, "the data, which are for a language model")


def preparation(recipe: Recipe) -> Callable[[Recipe, Console], Job]:
    """Return what makes the job of a settled recipe."""
    if not recipe.is_language:
        return prepare_texts
    from deltaw.language.prepare import prepare  # imports TRL

    return prepare


def _is_language(recipe: Recipe) -> bool:
    changed = recipe.changed.keys()
    if changed & {*LANGUAGE}:
        return True
    if changed & {*LABELLED}:
        return False
    several = not Path(recipe.data).exists() and ("," in recipe.data or "#" in recipe.data)
    return several or is_language(read_data(recipe.data, encoding=recipe.encoding))
