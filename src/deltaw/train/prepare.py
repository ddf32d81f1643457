"""From a recipe to everything a run needs: data, model, tokens, and the choices left open."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments

from deltaw.errors import ConfigError, RunError
from deltaw.recomputing import recompute
from deltaw.train import methods
from deltaw.train.batches import Collator, EpochSampler
from deltaw.train.choices import check_reports, chosen, recorded_recipe
from deltaw.train.console import Console
from deltaw.train.continuing import require_adapters
from deltaw.train.data.dataset import Data
from deltaw.train.effects import refuse_unread
from deltaw.train.escape import printable
from deltaw.train.identity import base_digest, tokenizer_digest
from deltaw.train.interrupt import Interrupt
from deltaw.train.job import Job
from deltaw.train.loop import RecipeTrainer, TextTrainer, arguments, loss
from deltaw.train.metrics import AGREEMENTS, CORRELATIONS, PRIMARY, Score, measure
from deltaw.train.model import (
    build_empty,
    load_config,
    load_model,
    load_tokenizer,
    positions,
    shape,
)
from deltaw.train.noise import require_one_stack
from deltaw.train.progress import ProgressBar
from deltaw.train.rates import planned
from deltaw.train.reading import read
from deltaw.train.receipt import show_data
from deltaw.train.recipe import Recipe
from deltaw.train.scores import evaluate, predictions
from deltaw.train.tokens import Encoded, Lengths, encode

WeighTexts = Callable[[Console, Recipe, nn.Module, Sequence[int], Sequence[int]], None]
"""Says what a recipe will take of memory, from its model without weights and the tokens of the
texts that are trained on and of those that are scored."""

SEEN = 16
"""How many batches a start from data sees."""
PROBE = 8
"""Rows on which adapters are tried."""
FEW = 4
"""Tokens of a row below which attention may have nothing to weigh."""


@dataclass(frozen=True)
class TextJob(Job):
    """Labelled texts for a classification head."""

    data: Data
    collator: Collator
    train: list[Encoded]
    validation: list[Encoded]
    held_out: list[Encoded]
    lengths: Lengths

    @property
    def rows(self) -> int:
        """How many texts are trained on."""
        return len(self.train)

    @property
    def validated(self) -> bool:
        """Whether there are validation rows."""
        return bool(self.validation)

    @property
    def tested(self) -> bool:
        """Whether there is a test part beside the validation part."""
        return bool(self.data.test)

    def trainer(self, folder: Path, interrupt: Interrupt, progress: ProgressBar) -> TextTrainer:
        """Return the Trainer, its optimiser built."""
        recipe, plan = self.recipe, self.plan
        task = self.data.schema.task

        def metrics(outcome: EvalPrediction) -> dict[str, float]:
            outputs = torch.as_tensor(outcome.predictions)
            trainer.require_finite(outputs, "An output for validation", trainer.state.global_step)
            return measure(task, outcome.label_ids, predictions(task, outputs))

        metric = plan.metric if self.validated else None
        trainer = TextTrainer(
            model=self.model,
            args=arguments(TrainingArguments, recipe, folder, plan, metric),
            train_dataset=self.train,
            eval_dataset=self.validation or None,
            data_collator=self.collator,
            compute_loss_func=loss,
            compute_metrics=metrics,
        )
        if recipe.gradient_checkpointing:  # before the first step, for the probe
            recompute(self.model)
        trainer.made_for(recipe, interrupt, progress)
        return trainer

    def probe(self, trainer: RecipeTrainer) -> dict[str, Tensor]:
        """Return a few rows, the shortest of several tokens, on which the adapters are tried."""
        sizes = _sizes(self.train)
        order = sorted(range(len(sizes)), key=lambda index: (sizes[index] < FEW, sizes[index]))
        return self.collator([self.train[i] for i in order[: min(PROBE, self.recipe.batch_size)]])

    def score(self) -> Score | None:
        """Return the model's score on the held-out rows, if there are any."""
        if not self.held_out:
            return None
        return evaluate(self.model, self.held_out, self.collator, self.data.schema.task)

    def show_rows(self, console: Console) -> None:
        """Say how long the texts are."""
        console.field("length", str(self.lengths))

    def commands(self, run: str) -> list[str]:
        """Return what to type next; `run` is the folder, quoted."""
        text = " ".join(['"..."'] * len(self.data.schema.text))
        return [f"deltaw predict {run} {text}", f"deltaw inspect {run}", f"deltaw merge {run} OUT"]


def prepare(recipe: Recipe, console: Console, *, weigh: WeighTexts | None = None) -> TextJob:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `weigh` says what memory it takes, before any weight is read.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    methods.lora_config(recipe)
    check_reports(recipe)
    require_adapters(recipe)
    data = read(recipe)
    show_data(console, data)
    refuse_unread(recipe, data.schema.task)
    _check_metric(recipe, data)
    _check_stopping(recipe, data)
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    labels = data.labels if data.schema.task == "classification" else None
    config = load_config(recipe.model, labels, **where)
    tokenizer = load_tokenizer(recipe.model, config, **where)
    empty = build_empty(config, recipe.model, trust_remote_code=recipe.trust_remote_code)
    require_one_stack(recipe, empty)
    limit = positions(empty)
    train, lengths = encode(tokenizer, data.train, recipe.max_length, limit=limit)
    _refuse_unknown(recipe, tokenizer, train)

    def encoded(examples: Sequence[Any]) -> list[Encoded]:
        return encode(tokenizer, examples, lengths.max_length, limit=limit)[0] if examples else []

    validation, test = encoded(data.validation), encoded(data.test)
    if weigh is not None:
        weigh(console, recipe, empty, _sizes(train), _sizes([*validation, *test]))
    model, untrained = load_model(config, recipe.model, recipe.seed, **where)
    base = base_digest(model)
    collator = Collator(tokenizer)
    first = _first_batches(recipe, train, collator)
    adapted = methods.adapt(model, recipe, untrained, first, _loss_of)
    plan = planned(
        recipe,
        len(train),
        shape(model.config),
        recipe.metric or PRIMARY[data.schema.task],
    )
    choices = {
        "text": list(data.schema.text),
        "label": data.schema.label,
        "task": data.schema.task,
        "max_length": lengths.max_length,
    }
    recorded = recorded_recipe(
        recipe,
        choices | chosen(recipe, plan, adapted),
        data.hashes,
        base=base,
        tokenizer=tokenizer_digest(tokenizer),
        adapters=adapted.began,
        labels=data.labels,
    )
    return TextJob(
        recipe=recorded,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        adapted=adapted,
        warnings=adapted.warnings,
        held_out_name="test" if test else "validation",
        data=data,
        collator=collator,
        train=train,
        validation=validation,
        held_out=test or validation,
        lengths=lengths,
    )


def _sizes(rows: Sequence[Encoded]) -> list[int]:
    return [len(row["input_ids"]) for row in rows]  # type: ignore[arg-type]


def _first_batches(
    recipe: Recipe, rows: Sequence[Encoded], collator: Collator
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches that a start from data sees, in an order of the seed's."""
    size = recipe.batch_size
    order = list(EpochSampler(_sizes(rows), size, recipe.seed, bucketed=False))[: size * SEEN]
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
