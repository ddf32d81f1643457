"""A finished run, loaded again from its folder alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

import deltaw
from deltaw.errors import FormatError, MergeError, RunError
from deltaw.train.data.detect import Task
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.identity import find_base, require_base, require_tokenizer
from deltaw.train.methods import IN_PLACE, restore
from deltaw.train.model import load_config, load_model, load_tokenizer
from deltaw.train.packing import packing
from deltaw.train.placing import place
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import RECIPE, read_recipe, read_results


@dataclass(frozen=True)
class Opened:
    """The model of a run with its adapter on, ready to predict."""

    folder: Path
    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    task: Task

    @property
    def shown(self) -> str:
        """The folder, safe to print."""
        return printable(str(self.folder), 300)

    def merge(self) -> str:
        """Merge the adapter into the weights where that is possible; return what was done."""
        if self.recipe.method in IN_PLACE:
            return "a model without adapters"
        if packing(self.recipe) is not None:
            return "adapter beside packed weights"
        try:
            deltaw.merge(self.model, original="none")
        except MergeError as error:
            return f"adapter not merged: {str(error).splitlines()[0]}"
        return "adapter merged into the weights"


def open_run(folder: Path, *, model: str | None = None, trust_remote_code: bool = False) -> Opened:
    """Load the base that the run names (or `model`) and put the run's adapter on it.

    Raises:
        RunError: if the folder is not a finished run, or its base or tokenizer cannot be loaded or
            is another.
        FormatError: if the adapter's file is damaged or does not fit the base.
    """
    recipe = read_recipe(folder)
    if recipe.is_language:
        raise RunError(
            f"The run in {printable(str(folder), 300)} is a language model's, which labels nothing."
            "\nFix: use deltaw chat, deltaw eval or deltaw export."
        )
    if not read_results(folder):
        raise RunError(
            f"The run in {printable(str(folder), 300)} is not finished.\n"
            "Fix: give the same `deltaw train` command again; it resumes."
        )
    task: Task = "regression" if recipe.task == "regression" else "classification"
    labels = tuple((recipe.record or {}).get("labels", ()))
    if task == "classification" and len(labels) < 2:
        raise _lost_labels(folder, labels)
    in_place = recipe.method in IN_PLACE
    source = str(folder) if in_place else find_base(recipe, model)
    config = load_config(
        source,
        labels if task == "classification" else None,
        revision=None if in_place else recipe.revision,
        trust_remote_code=trust_remote_code,
    )
    if in_place and labels and labels != _saved_labels(folder, trust_remote_code):
        raise _lost_labels(folder, labels)
    tokenizer = load_tokenizer(str(folder), config, trust_remote_code=trust_remote_code)
    require_tokenizer(tokenizer, folder, recipe)
    loaded, untrained = load_model(
        config,
        source,
        recipe.seed,
        revision=None if in_place else recipe.revision,
        trust_remote_code=trust_remote_code,
    )
    if not in_place:
        require_base(loaded, source, recipe)
        try:
            restore(loaded, recipe, folder, untrained)
        except FormatError as error:
            raise FormatError(
                f"{error}\nFix: restore the run's files, {RECIPE} with its labels among them "
                f"({len(labels)} now), or train again with --overwrite."
            ) from error
    place(loaded).eval()
    return Opened(folder, recipe, loaded, tokenizer, labels, task)


def _saved_labels(folder: Path, trust_remote_code: bool) -> tuple[str, ...]:
    """Return the classes that a model saved in `folder` was trained for."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return tuple(config.id2label.values())


def _lost_labels(folder: Path, labels: tuple[str, ...]) -> RunError:
    return RunError(
        f"{printable(str(folder / RECIPE), 300)}: the {counted(len(labels), 'label')} of its "
        "record are not those that the run was trained on.\n"
        "Fix: restore the file, or train again with --overwrite."
    )
