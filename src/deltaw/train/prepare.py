"""From a recipe to everything a run needs: data, model, tokens, and the choices left open."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.integrations import get_available_reporting_integrations

from deltaw.errors import ConfigError, RunError
from deltaw.train import methods, rates
from deltaw.train.batches import Collator, EpochSampler
from deltaw.train.console import Console
from deltaw.train.data.dataset import Data, build
from deltaw.train.data.detect import detect
from deltaw.train.data.table import read_data
from deltaw.train.escape import printable
from deltaw.train.identity import base_digest, tokenizer_digest
from deltaw.train.loop import loss
from deltaw.train.metrics import AGREEMENTS, CORRELATIONS, PRIMARY
from deltaw.train.model import (
    full_name,
    hidden_size,
    load_config,
    load_model,
    load_tokenizer,
    positions,
)
from deltaw.train.packing import pack
from deltaw.train.rates import Choice
from deltaw.train.receipt import show_data
from deltaw.train.recipe import Recipe
from deltaw.train.tokens import Encoded, Lengths, encode

SEEN = 16
"""How many batches a start from data sees."""
VERSIONS = ("deltaw", "torch", "transformers", "tokenizers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Job:
    """A run that is ready to start; the record of `recipe` holds every choice that it left open."""

    recipe: Recipe
    data: Data
    model: nn.Module
    tokenizer: Any
    collator: Collator
    train: list[Encoded]
    validation: list[Encoded]
    held_out: list[Encoded]
    held_out_name: str
    lengths: Lengths
    adapted: str
    warnings: tuple[str, ...]
    steps: int
    every: int
    epochs: Choice
    rate: Choice
    usual_rate: float
    metric: str


def prepare(recipe: Recipe, console: Console) -> Job:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    methods.lora_config(recipe)
    _check_reports(recipe)
    data = read(recipe)
    show_data(console, data)
    _check_metric(recipe, data)
    _check_stopping(recipe, data)
    tokenizer, model, untrained = _load(recipe, data)
    limit = positions(model)
    train, lengths = encode(tokenizer, data.train, recipe.max_length, limit=limit)
    _refuse_unknown(recipe, tokenizer, train)
    base = base_digest(model)
    collator = Collator(tokenizer)
    first = _first_batches(recipe, train, collator)
    if not recipe.absorb:
        pack(model, recipe, untrained)
    adapted, warnings = methods.prepare(model, recipe, untrained, first, _loss_of)
    if recipe.absorb:
        pack(model, recipe, untrained)
    total = rates.steps(recipe, len(train))
    width = hidden_size(model.config)
    epochs, rate = rates.epochs(recipe, len(train)), rates.learning_rate(recipe, width, total)
    usual = rates.learning_rate(recipe.model_copy(update={"learning_rate": None}), width, total)
    every = rates.evaluate_every(recipe, total)
    metric = recipe.metric or PRIMARY[data.schema.task]
    choices = {
        "text": list(data.schema.text),
        "label": data.schema.label,
        "task": data.schema.task,
        "max_length": lengths.max_length,
        **({"lora_alpha": float(2 * recipe.r)} if recipe.method == "lora" else {}),
        "epochs": float(epochs.value),
        "max_steps": total,
        "learning_rate": rate.value,
        "eval_every": every,
        "metric": metric,
    }
    digests = {"base": base, "tokenizer": tokenizer_digest(tokenizer)}
    recorded = _recorded(recipe, choices, data, digests)

    def encoded(examples: Sequence[Any]) -> list[Encoded]:
        return encode(tokenizer, examples, lengths.max_length, limit=limit)[0] if examples else []

    validation, test = encoded(data.validation), encoded(data.test)
    return Job(
        recipe=recorded,
        data=data,
        model=model,
        tokenizer=tokenizer,
        collator=collator,
        train=train,
        validation=validation,
        held_out=test or validation,
        held_out_name="test" if test else "validation",
        lengths=lengths,
        adapted=adapted,
        warnings=warnings,
        steps=total,
        every=every,
        epochs=epochs,
        rate=rate,
        usual_rate=usual.value,
        metric=metric,
    )


def _load(recipe: Recipe, data: Data) -> tuple[Any, nn.Module, list[str]]:
    """Return tokenizer and model with a head for the labels, and what of it was never trained."""
    labels = data.labels if data.schema.task == "classification" else None
    source, trust = recipe.model, recipe.trust_remote_code
    config = load_config(source, labels, revision=recipe.revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(source, config, revision=recipe.revision, trust_remote_code=trust)
    model, untrained = load_model(
        config, source, recipe.seed, revision=recipe.revision, trust_remote_code=trust
    )
    return tokenizer, model, untrained


def _first_batches(
    recipe: Recipe, rows: Sequence[Encoded], collator: Collator
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches that a start from data sees, in an order of the seed's."""
    size = recipe.batch_size
    lengths = [len(row["input_ids"]) for row in rows]  # type: ignore[arg-type]
    order = list(EpochSampler(lengths, size, recipe.seed, bucketed=False))[: size * SEEN]
    for start in range(0, len(order), size):
        yield collator([rows[index] for index in order[start : start + size]])


def _loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    return loss(model(**{key: batch[key] for key in batch if key != "labels"}), labels)


def _refuse_unknown(recipe: Recipe, tokenizer: Any, rows: Sequence[Encoded]) -> None:
    """Raise if the tokenizer knows no word of any row."""
    special = set(tokenizer.all_special_ids)
    if all(special.issuperset(row["input_ids"]) for row in rows):  # type: ignore[arg-type]
        raise RunError(
            f"The tokenizer of {printable(recipe.model, 200)} knows nothing in any of the texts.\n"
            "Fix: check that its files belong to the model, and that the model reads this language."
        )


def _recorded(
    recipe: Recipe, choices: Mapping[str, Any], data: Data, digests: Mapping[str, str]
) -> Recipe:
    """Return the recipe with its places in full and the record of what it was run on."""
    return recipe.model_copy(
        update={
            "model": full_name(recipe.model),
            "data": full_data_name(recipe.data),
            "output": None if recipe.output is None else str(Path(recipe.output).resolve()),
            "record": {
                "chosen": {key: v for key, v in choices.items() if getattr(recipe, key) is None},
                "versions": {name: version(name) for name in VERSIONS}
                | {"python": platform.python_version()},
                "data": {Path(path).name: digest for path, digest in data.hashes.items()},
                **digests,
                "labels": list(data.labels),
            },
        }
    )


def _check_reports(recipe: Recipe) -> None:
    installed = get_available_reporting_integrations()
    unusable = [name for name in recipe.report_to if name not in installed]
    if unusable and recipe.report_to not in (["all"], ["none"]):
        raise ConfigError(
            f"report_to={printable(', '.join(unusable))}: not installed, or unknown to "
            "transformers.\nFix: install it, leave report_to out, or give all, none, or names of "
            f"what is installed ({', '.join(installed) or 'nothing is'})."
        )


def _check_stopping(recipe: Recipe, data: Data) -> None:
    if recipe.early_stopping is not None and not data.validation:
        raise ConfigError(
            f"early_stopping={recipe.early_stopping} needs validation rows, and there are none.\n"
            "Fix: leave it out, or set validation_share above 0."
        )


def _check_metric(recipe: Recipe, data: Data) -> None:
    fitting = AGREEMENTS if data.schema.task == "classification" else CORRELATIONS
    if recipe.metric is not None and recipe.metric not in fitting:
        raise ConfigError(
            f"metric={recipe.metric} does not fit a {data.schema.task}.\n"
            f"Fix: choose one of {', '.join(fitting)}."
        )


def read(recipe: Recipe) -> Data:
    """Return the examples of the recipe's data."""
    splits = read_data(recipe.data, encoding=recipe.encoding)
    schema = detect(splits.train, recipe.text, recipe.label, recipe.task)
    return build(
        splits,
        schema,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        validation_share=recipe.validation_share,
        test_share=recipe.test_share,
        allow_leakage=recipe.allow_leakage,
        max_train_rows=recipe.max_train_rows,
    )


def full_data_name(name: str) -> str:
    """Return a local path as an absolute one and a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
