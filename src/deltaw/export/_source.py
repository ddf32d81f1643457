"""What is exported: the adapter of a run or of a folder of PEFT's, and where its base is."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaw.errors import RunError, printable
from deltaw.formats import peft
from deltaw.state import State
from deltaw.train.identity import find_base
from deltaw.train.methods import IN_PLACE
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import RECIPE, read_recipe, read_results

SEQ2SEQ = "SEQ_2_SEQ_LM"
TASKS = ("CAUSAL_LM", SEQ2SEQ, "SEQ_CLS", None)


@dataclass(frozen=True)
class Source:
    """An adapter, read; nothing of its base is loaded yet.

    `name` is the base as the adapter knows it and `base` where to load it from, None where nobody
    says; `revision` is that of the hub for `base`. `task` is PEFT's name of the task, None where
    the base decides. `recipe` and `results` are there for a run of `deltaw train`.
    """

    folder: Path
    state: State
    name: str | None
    base: str | None
    revision: str | None
    task: str | None
    recipe: Recipe | None
    results: dict[str, Any]
    trust_remote_code: bool = False

    @property
    def shown(self) -> str:
        """The folder, safe to print."""
        return printable(str(self.folder), 300)

    def require_base(self) -> str:
        """Return where the base is; raise `RunError` if nobody says."""
        if self.base is None:
            raise RunError(
                f"{self.shown} does not say which model it was trained on.\n"
                "Fix: name it with --base."
            )
        return self.base


def open_source(
    folder: Path, base: str | None = None, *, trust_remote_code: bool = False
) -> Source:
    """Read the adapter in `folder`, and find its base, which `base` overrides.

    `trust_remote_code` lets code that comes with the base run once that is loaded.

    Raises:
        RunError: if it is a run that is not finished or has no adapter, or for a task that is not
            known.
        FormatError: if the files are not a LoRA adapter of PEFT's, or damaged.
    """
    recipe = read_recipe(folder) if (folder / RECIPE).is_file() else None
    results = {}
    if recipe is not None:
        results = require_finished(folder)
        _refuse_in_place(folder, recipe)
    state = peft.read(folder)
    config = state.config
    name = config.base_model_name_or_path or (recipe.model if recipe is not None else base)
    revision = recipe.revision if recipe is not None else config.revision
    where = base or (find_base(recipe, None) if recipe is not None else name)
    task = config.task_type
    if task is None and recipe is not None and recipe.task in ("classification", "regression"):
        task = "SEQ_CLS"
    if task not in TASKS:
        raise RunError(
            f"{printable(str(folder), 300)} is for {task}; only adapters of language models "
            f"(CAUSAL_LM, {SEQ2SEQ}) and of classifiers (SEQ_CLS) can be exported."
        )
    config = replace(config, base_model_name_or_path=name, revision=revision)
    return Source(
        folder,
        replace(state, config=config),
        name,
        where,
        revision if where == name else None,
        task,
        recipe,
        results,
        trust_remote_code,
    )


def require_new(out: Path) -> None:
    """Raise `RunError` unless a folder does not exist or is empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{printable(str(out), 300)} is not empty. Fix: give a new folder.")


def require_finished(run: Path) -> dict[str, Any]:
    """Return the scores of a run; raise `RunError` if it is not finished."""
    results = read_results(run)
    if not results:
        raise RunError(
            f"The run in {printable(str(run), 300)} is not finished.\n"
            "Fix: give the same `deltaw train` command again; it resumes."
        )
    return results


def _refuse_in_place(folder: Path, recipe: Recipe) -> None:
    if recipe.method in IN_PLACE:
        raise RunError(
            f"The run in {printable(str(folder), 300)} trained the model's own weights "
            f"(method={recipe.method}): there is no adapter.\n"
            "Fix: use the folder as it is, transformers loads it; or copy it with `deltaw merge`."
        )
