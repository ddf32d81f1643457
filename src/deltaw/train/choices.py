"""What a run chose for itself, and what of it is written down."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from deltaw.errors import ConfigError
from deltaw.train.continuing import Adapted
from deltaw.train.escape import printable
from deltaw.train.model import full_name
from deltaw.train.rates import TrainingPlan
from deltaw.train.recipe import Recipe

VERSIONS = ("deltaw", "torch", "transformers", "tokenizers", "accelerate", "safetensors")


def chosen(recipe: Recipe, plan: TrainingPlan, adapted: Adapted) -> dict[str, Any]:
    """Return what every kind of training chooses, by the recipe's keys."""
    new = recipe.method == "lora" and not recipe.goes_on
    return {
        **({"lora_alpha": float(2 * recipe.r)} if new else {}),
        **adapted.chosen,
        "epochs": float(plan.epochs.value),
        "max_steps": plan.steps,
        "learning_rate": plan.rate.value,
        "eval_every": plan.every,
        "metric": plan.metric,
    }


def recorded_recipe(
    recipe: Recipe,
    choices: Mapping[str, Any],
    hashes: Mapping[str, str],
    *,
    base: str,
    tokenizer: str,
    adapters: Sequence[str] = (),
    labels: Sequence[str] = (),
    reading: str | None = None,
) -> Recipe:
    """Return the recipe with its places in full and the record of what it was run on."""
    return recipe.model_copy(
        update={
            "model": full_name(recipe.model),
            "data": full_data_name(recipe.data, recipe.dataset_dir),
            "eval_data": _full_data(recipe.eval_data, recipe.dataset_dir),
            "output": _full(recipe.output),
            "dataset_dir": _full(recipe.dataset_dir),
            "adapter": recipe.adapter and [str(Path(path).resolve()) for path in recipe.adapter],
            "record": {
                "chosen": {key: v for key, v in choices.items() if getattr(recipe, key) is None},
                "versions": {name: version(name) for name in VERSIONS}
                | {"python": platform.python_version()},
                "data": by_name(hashes),
                "base": base,
                "tokenizer": tokenizer,
                "labels": list(labels),
            }
            | ({"adapters": list(adapters)} if adapters else {})
            | ({} if reading is None else {"reading": reading}),
        }
    )


def by_name(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return digests by the names of their files, with as many folders as tell all apart."""
    paths = [Path(path) for path in hashes]
    size, most = 1, max((len(path.parts) for path in paths), default=1)
    while size < most and len({path.parts[-size:] for path in paths}) < len(paths):
        size += 1
    return {
        "/".join(path.parts[-size:]): digest
        for path, digest in zip(paths, hashes.values(), strict=True)
    }


def check_reports(recipe: Recipe) -> None:
    """Refuse places to report to that are not installed, and a picture that nothing draws."""
    if recipe.plot_loss and find_spec("matplotlib") is None:
        raise ConfigError(
            "plot_loss=True draws with matplotlib, which is not installed.\n"
            "Fix: pip install matplotlib, or leave plot_loss out."
        )
    installed = get_available_reporting_integrations()
    unusable = [name for name in recipe.report_to if name not in installed]
    if unusable and recipe.report_to not in (["all"], ["none"]):
        raise ConfigError(
            f"report_to={printable(', '.join(unusable))}: not installed, or unknown to "
            "transformers.\nFix: install it, leave report_to out, or give all, none, or names of "
            f"what is installed ({', '.join(installed) or 'nothing is'})."
        )


def _full(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def full_data_name(names: str, folder: str | None = None) -> str:
    """Return local paths as absolute ones; hub names, and names within a `folder`, as they are."""
    if Path(names).exists():
        return str(Path(names).resolve())
    return names if folder is not None else ",".join(map(_full_part, names.split(",")))


def _full_part(name: str) -> str:
    name = name.strip()
    if Path(name).exists():
        return str(Path(name).resolve())
    path, mark, limit = name.rpartition("#")
    return f"{Path(path).resolve()}#{limit}" if mark and Path(path).exists() else name


def _full_data(names: str | None, folder: str | None) -> str | None:
    return None if names is None else full_data_name(names, folder)
