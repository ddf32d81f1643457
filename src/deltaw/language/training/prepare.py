"""From a recipe to everything that the training of a language model needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import SFTConfig

from deltaw.language import scores
from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.batches import Padding, as_data, packed, require_apart
from deltaw.language.encoding.encoder import Row, Rows, samples_of
from deltaw.language.encoding.templating import Chosen
from deltaw.language.examining import Examination, examination
from deltaw.language.generating import Speaker
from deltaw.language.loading import load_model
from deltaw.language.memory.outlook import outlook
from deltaw.language.memory.shapes import Sides
from deltaw.language.memory.weighing import Weigh, weigh
from deltaw.language.metrics.scoring import METRICS, beside
from deltaw.language.reading import (
    require_rows,
    require_scored,
    require_turns,
)
from deltaw.language.training.each_set import EachSet, sets_of
from deltaw.language.training.foreseeing import foresee
from deltaw.language.training.opening import begin
from deltaw.language.training.receipt import Tokens, held_out_lines, record_skips, tokens_of
from deltaw.language.training.trainer import AnswerTrainer, LanguageTrainer, Seq2SeqTrainer
from deltaw.language.training.trying import Tries
from deltaw.recomputing import recompute
from deltaw.train import methods
from deltaw.train.batches import EpochSampler
from deltaw.train.console import Console
from deltaw.train.identity import base_digest
from deltaw.train.interrupt import Interrupt
from deltaw.train.job import Job
from deltaw.train.loop import RecipeTrainer, arguments
from deltaw.train.metrics import Score
from deltaw.train.model import shape
from deltaw.train.progress import ProgressBar
from deltaw.train.rates import planned
from deltaw.train.recipe import Recipe
from deltaw.train.stopping import stop_at

PROBE = 4
SEEN = 16
"""How many batches a start from data sees."""


@dataclass(frozen=True, slots=True)
class Examinations:
    """What states are compared by where that is answers, and what the last one is scored by."""

    validation: Examination | None = None
    held_out: Examination | None = None


@dataclass(frozen=True)
class LanguageJob(Job):
    """Conversations and texts for a causal language model."""

    corpus: Corpus
    train: list[Row]
    validation: list[Row]
    held_out: list[Row]
    apart: Mapping[str, Rows]
    data: Dataset
    padding: Padding
    tokens: Tokens
    template: Chosen
    console: Console
    examinations: Examinations

    @property
    def rows(self) -> int:
        """How many rows are trained on; packed ones hold several samples."""
        return len(self.data)

    @property
    def validated(self) -> bool:
        """Whether there are validation rows."""
        return bool(self.validation)

    @property
    def tested(self) -> bool:
        """Whether there is a test part beside the validation part."""
        return bool(self.corpus.test)

    def trainer(self, folder: Path, interrupt: Interrupt, progress: ProgressBar) -> RecipeTrainer:
        """Return the Trainer, its optimiser built."""
        trainer = self._bare_trainer(folder, self.plan.metric if self.validated else None)
        trainer.judged = self.validation
        trainer.examination = self.examinations.validation
        if self.recipe.eval_on_each_dataset:
            trainer.sets = sets_of(self.corpus, self.validation)
            trainer.add_callback(EachSet(trainer.sets, self.console))
        if self.recipe.gradient_checkpointing:  # before the first step, for the probe
            recompute(self.model)
        speaker = Speaker(self.model, self.tokenizer, self.tokens.encoder)
        trainer.add_callback(Tries(speaker, self.held_out, self.recipe.samples, self.console))
        trainer.made_for(self.recipe, interrupt, progress)
        return trainer

    def _bare_trainer(self, folder: Path, metric: str | None) -> AnswerTrainer:
        """Return the Trainer of this kind of model."""
        args = arguments(SFTConfig, self.recipe, folder, self.plan, metric)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.max_length = None
        return LanguageTrainer(args=args, **self._parts(metric))

    def _parts(self, metric: str | None) -> dict[str, Any]:
        """Return what every Trainer is given."""
        return {
            "model": self.model,
            "train_dataset": self.data,
            "eval_dataset": Dataset.from_dict(as_data(self.validation)) if metric else None,
            "data_collator": self.padding,
            "processing_class": self.tokenizer,
        }

    def probe(self, trainer: RecipeTrainer) -> dict[str, Any]:
        """Return a few rows, the shortest, on which the adapters are tried, as in training."""
        lengths = trainer._lengths()
        shortest = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows = [self.data[index] for index in shortest[: min(PROBE, self.recipe.batch_size)]]
        fused = isinstance(trainer, LanguageTrainer) and not trainer.through_logits
        batch: dict[str, Any] = {**self.padding(rows), "use_cache": False}
        return batch | ({"fused_lm_head": True} if fused else {})

    def score(self) -> Score | None:
        """Return the model's score on the held-out rows, if there are any."""
        if not self.held_out:
            return None
        found = scores.score(scores.measured(self.model, self.held_out, self.padding))
        exam = self.examinations.held_out
        return found if exam is None else beside(found, self.plan.metric, exam.sit())

    def show_rows(self, console: Console) -> None:
        """Say which tokens are learnt and how long the rows are."""
        console.field("template", self.template.origin)
        console.field("tokens", "\n".join([str(self.tokens), *held_out_lines(self.apart)]))
        for part in (self.tokens.found, *self.apart.values()):
            record_skips(console, part.skipped)
        if self.examinations.held_out is not None:
            console.field("answers", str(self.examinations.held_out))

    def foresee(self, console: Console) -> None:
        """Say what the base knows of the answers, what an adapter can hold, and how they end."""
        super().foresee(console)
        foresee(console, self)

    def commands(self, run: str) -> list[str]:
        """Return what to type next; `run` is the folder, quoted."""
        whole = self.recipe.method in methods.IN_PLACE
        last = f"deltaw merge {run} OUT" if whole else f"deltaw export {run} OUT --to hf"
        return [f"deltaw chat {run}", f"deltaw eval {run}", last]


class Seq2SeqJob(LanguageJob):
    """Prompts and answers for a sequence-to-sequence model."""

    def _bare_trainer(self, folder: Path, metric: str | None) -> AnswerTrainer:
        args = arguments(TrainingArguments, self.recipe, folder, self.plan, metric)
        return Seq2SeqTrainer(args=args, **self._parts(metric))


def prepare(recipe: Recipe, console: Console, *, weigh: Weigh = weigh) -> LanguageJob:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `weigh` says what memory it takes, before any weight is read.

    Raises:
        ConfigError, TargetError, RunError: whatever is wrong with its part.
    """
    opening = begin(recipe, console, ("loss", *METRICS))
    corpus, encoder, tokenizer = opening.corpus, opening.encoder, opening.tokenizer
    require_turns(corpus.train, corpus)
    train = encoder.encode(corpus.train)
    validation, test = encoder.encode(corpus.validation), encoder.encode(corpus.test)
    require_rows(train, corpus)
    require_scored(
        recipe, len(corpus.validation), len(validation.rows), validation.skipped, console
    )
    data = packed(train.rows, encoder.max_length) if recipe.packing else as_data(train.rows)
    held = as_data([*validation.rows, *test.rows])
    sizes = (_sides(columns, opening.model) for columns in (data, held))
    weigh(console, outlook(recipe, opening.model, *sizes))
    model = load_model(recipe)
    stop_at(model, encoder.end_ids)
    if recipe.packing:
        require_apart(model, train.rows)
    base = base_digest(model)
    padding = Padding(tokenizer.pad_token_id)
    rows = Dataset.from_dict(data)
    first = first_batches(recipe, train.rows, padding)
    adapted = methods.adapt(model, recipe, (), first, loss_of)
    plan = planned(recipe, len(rows), shape(model.config), recipe.metric or "loss")
    scored = test.rows or validation.rows
    kind = Seq2SeqJob if model.config.is_encoder_decoder else LanguageJob  # type: ignore[union-attr]
    return kind(
        recipe=opening.recorded(plan, base, adapted),
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        adapted=adapted,
        warnings=adapted.warnings,
        held_out_name="test" if test.rows else "validation",
        corpus=corpus,
        train=train.rows,
        validation=validation.rows,
        held_out=scored,
        apart={"validation": validation, "test": test},
        data=rows,
        padding=padding,
        tokens=tokens_of(train, encoder, len(rows) if recipe.packing else None),
        template=opening.template,
        console=console,
        examinations=_examinations(
            Speaker(model, tokenizer, encoder), recipe, (validation.rows, scored)
        ),
    )


def _examinations(speaker: Speaker, recipe: Recipe, parts: Sequence[Sequence[Row]]) -> Examinations:
    """Return what is asked of validation and held-out rows where the metric scores answers."""
    if recipe.metric not in METRICS:
        return Examinations()
    return Examinations(
        *(examination(speaker, recipe, samples_of(rows)) if rows else None for rows in parts)
    )


def _sides(columns: Mapping[str, Sequence[Sequence[int]]], model: nn.Module) -> list[Sides]:
    """Return how many tokens of each row are read, and how many answers are apart from them."""
    read = [len(ids) for ids in columns["input_ids"]]
    apart = model.config.is_encoder_decoder  # type: ignore[union-attr]
    answers = [len(ids) if apart else 0 for ids in columns["labels"]]
    return list(zip(read, answers, strict=True))


def first_batches(
    recipe: Recipe, rows: Sequence[Row], padding: Padding
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches that a start from data sees, in an order of the seed's."""
    size = recipe.batch_size
    data = as_data(rows)
    lengths = [len(row.input_ids) for row in rows]
    order = list(EpochSampler(lengths, size, recipe.seed, bucketed=False))[: size * SEEN]
    for start in range(0, len(order), size):
        some = order[start : start + size]
        yield padding([{name: data[name][index] for name in data} for index in some])


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a batch per learnt token, as a start from data asks for it."""
    loss: Tensor = model(**batch)["loss"]
    return loss
