"""What a run chose for itself, and what of it is written down."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from deltaw.errors import ConfigError
from deltaw.train.escape import printable
from deltaw.train.model import full_name
from deltaw.train.rates import TrainingPlan
from deltaw.train.recipe import Recipe

VERSIONS = ("deltaw", "torch", "transformers", "tokenizers", "accelerate", "safetensors")


def chosen(recipe: Recipe, plan: TrainingPlan) -> dict[str, Any]:
    """Return what every kind of training chooses, by the recipe's keys."""
    return {
        **({"lora_alpha": float(2 * recipe.r)} if recipe.method == "lora" else {}),
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
    labels: Sequence[str] = (),
) -> Recipe:
    """Return the recipe with its places in full and the record of what it was run on."""
    return recipe.model_copy(
        update={
            "model": full_name(recipe.model),
            "data": full_data_name(recipe.data),
            "output": _full(recipe.output),
            "dataset_dir": _full(recipe.dataset_dir),
            "record": {
                "chosen": {key: v for key, v in choices.items() if getattr(recipe, key) is None},
                "versions": {name: version(name) for name in VERSIONS}
                | {"python": platform.python_version()},
                "data": {Path(path).name: digest for path, digest in hashes.items()},
                "base": base,
                "tokenizer": tokenizer,
                "labels": list(labels),
            },
        }
    )


def check_reports(recipe: Recipe) -> None:
    """Refuse places to report to that are not installed."""
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


def full_data_name(name: str) -> str:
    """Return a local path as an absolute one and a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
