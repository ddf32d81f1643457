"""Is a recipe's data for a language model or for a classifier? What trains follows from it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.language.data.detect import find, is_language, kind_given
from deltaw.language.data.reading import read_splits
from deltaw.language.data.schema import Kind
from deltaw.language.data.sources import resolve
from deltaw.language.memory.weighing import Weigh, of_texts, weigh
from deltaw.language.reading import request
from deltaw.train.console import Console
from deltaw.train.data.table import read_data
from deltaw.train.job import Job
from deltaw.train.keys import EITHER, JUDGED, LABELLED, LANGUAGE, PREFERENCES, RATED
from deltaw.train.prepare import prepare as prepare_texts
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import train as run

TASKS: Mapping[Kind | None, str] = {"preference": "dpo", "rating": "kto"}
"""What rows with a judgement are for."""


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


def preparation(recipe: Recipe, weigh: Weigh = weigh) -> Callable[[Recipe, Console], Job]:
    """Return what makes the job of a settled recipe; `weigh` says what memory it takes."""
    if not recipe.is_language:
        return partial(prepare_texts, weigh=of_texts(weigh))
    if recipe.task == "dpo":
        from deltaw.language.training.preferring import prepare as prepare_pairs  # imports TRL

        return partial(prepare_pairs, weigh=weigh)
    if recipe.task == "kto":
        from deltaw.language.training.rating import prepare as prepare_ratings  # imports TRL

        return partial(prepare_ratings, weigh=weigh)
    from deltaw.language.training.prepare import prepare  # imports TRL

    return partial(prepare, weigh=weigh)


def _language_task(recipe: Recipe) -> str | None:
    """Return what the data are for by the recipe's keys and their columns, None for classes."""
    changed = recipe.changed.keys()
    if changed & {*LABELLED}:
        return None
    if changed & {*PREFERENCES, *RATED}:
        return "dpo" if changed & {*PREFERENCES} else "kto"
    usual = "dpo" if changed & {*JUDGED} else "sft"
    several = not Path(recipe.data).exists() and ("," in recipe.data or "#" in recipe.data)
    certain = several or bool(changed & {*LANGUAGE} - {*EITHER})
    if several or changed & {*LANGUAGE}:
        asked = request(recipe)
        (first, *_) = resolve(recipe.data, dataset_dir=asked.dataset_dir, columns=asked.columns)
        if first.entry.columns:
            return TASKS.get(kind_given(first.entry.columns), usual)
        splits = read_splits(first.entry, encoding=recipe.encoding)
    else:
        splits = read_data(recipe.data, encoding=recipe.encoding, prose=True)
    if not certain and not is_language(splits):
        return None
    schema = find(splits.train)
    return usual if schema is None else TASKS.get(schema.kind, usual)
