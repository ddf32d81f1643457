"""Training on judged answers: the reference is the same model with its adapters off.

What the reference says of every answer is computed once before training, so that no second model is
needed, neither in memory nor in every step.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

import deltaw
from deltaw.errors import ConfigError, DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import Chosen
from deltaw.language.generating import Speaker
from deltaw.language.loading import load_model
from deltaw.language.memory.outlook import outlook
from deltaw.language.memory.weighing import Weigh
from deltaw.language.reading import require_scored
from deltaw.language.training.judged import Judged, Known
from deltaw.language.training.opening import Opening, begin
from deltaw.language.training.prepare import first_batches, loss_of
from deltaw.language.training.receipt import held_out_lines, record_skips, skips
from deltaw.language.training.sides import lines
from deltaw.language.training.trying import Tries
from deltaw.layer import AdaptedLayer
from deltaw.recomputing import recompute
from deltaw.train import methods
from deltaw.train.console import Console
from deltaw.train.identity import base_digest
from deltaw.train.interrupt import Interrupt
from deltaw.train.job import Job
from deltaw.train.loop import RecipeTrainer
from deltaw.train.metrics import Score
from deltaw.train.model import shape
from deltaw.train.placing import place
from deltaw.train.progress import ProgressBar
from deltaw.train.rates import planned
from deltaw.train.recipe import Recipe
from deltaw.train.stopping import stop_at

PROBE = 4


class Absent(nn.Module):
    """Stands where TRL expects a reference model, which would be loaded or hashed otherwise.

    It computes nothing: what the reference says is known.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config


class JudgedTrainer(RecipeTrainer):
    """A trainer of TRL's by a recipe, over judged answers whose reference is known."""

    judged: Known
    padding: Padding
    longest_first = True

    def made_for(self, recipe: Recipe, interrupt: Interrupt, progress: Any) -> None:
        """Follow this recipe; take what the reference says from the data."""
        self.ref_model = None
        self.precompute_ref_logps = True
        super().made_for(recipe, interrupt, progress)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; raise `DivergedError` on a loss that is no number."""
        began = time.perf_counter()
        found = self.judged.score(self.model, self.padding, self.recipe)
        self.require_finite(torch.tensor(found.value), "eval_loss", self.state.global_step)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in found.values.items()}
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - began, 4)
        return EvalLoopOutput(None, None, metrics, found.rows)


@dataclass(frozen=True)
class JudgedJob(Job):
    """Judged answers, in parts, and what is said of them."""

    corpus: Corpus
    train: Known
    validation: Known | None
    held_out: Known | None
    apart: Mapping[str, Judged]
    padding: Padding
    template: Chosen
    encoder: Encoder
    reference: str | None
    console: Console

    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """What the best state may be chosen by."""

    @property
    def rows(self) -> int:
        """How many judgements are trained on."""
        return len(self.train.judged)

    @property
    def validated(self) -> bool:
        """Whether there are judgements to validate by."""
        return self.validation is not None

    @property
    def tested(self) -> bool:
        """Whether there is a test part beside the validation part."""
        return bool(self.corpus.test)

    @abstractmethod
    def build(self, folder: Path, metric: str | None) -> JudgedTrainer:
        """Return TRL's trainer for these judgements; `metric` names the validation score."""

    @property
    @abstractmethod
    def counted(self) -> tuple[str, str]:
        """The name of the judgements and how many there are, in words."""

    def parts(self, args: TrainingArguments) -> dict[str, Any]:
        """Return what every trainer of TRL's is made of."""
        args.max_length = None
        validation = self.validation
        return {
            "model": self.model,
            "ref_model": Absent(self.model.config),  # type: ignore[arg-type]
            "args": args,
            "train_dataset": _as_data(self.train),
            "eval_dataset": None if validation is None else _as_data(validation),
            "processing_class": self.tokenizer,
        }

    def trainer(self, folder: Path, interrupt: Interrupt, progress: ProgressBar) -> RecipeTrainer:
        """Return the Trainer, its optimiser built."""
        trainer = self.build(folder, self.plan.metric if self.validated else None)
        if self.validation is not None:
            trainer.judged = self.validation
        trainer.padding = self.padding
        if self.recipe.gradient_checkpointing:  # before the first step, for the probe
            recompute(self.model)
        speaker = Speaker(self.model, self.tokenizer, self.encoder)
        better = [] if self.held_out is None else self.held_out.judged.better()
        trainer.add_callback(Tries(speaker, better, self.recipe.samples, self.console))
        trainer.made_for(self.recipe, interrupt, progress)
        return trainer

    def probe(self, trainer: RecipeTrainer) -> dict[str, Any]:
        """Return a few rows, the shortest, on which the adapters are tried, as in training."""
        rows = [row for side in self.train.judged.sides().values() for row in side]
        rows.sort(key=lambda row: len(row.input_ids))
        rows = rows[: min(PROBE, self.recipe.batch_size)]
        batch = self.padding([{"input_ids": r.input_ids, "labels": r.labels} for r in rows])
        return {**batch, "use_cache": False, "fused_lm_head": True}

    def score(self) -> Score | None:
        """Return the model's score on the held-out judgements, if there are any."""
        if self.held_out is None:
            return None
        return self.held_out.score(self.model, self.padding, self.recipe)

    def show_rows(self, console: Console) -> None:
        """Say how many judgements there are, what they are compared by, and how long they are."""
        judged = self.train.judged
        name, count = self.counted
        console.field("template", self.template.origin)
        found = [f"{count}; {_named(self.reference)}"]
        console.field(name, "\n".join([*found, *skips(judged.skipped)]))
        sizes = lines(judged, self.encoder)
        console.field("tokens", "\n".join([*sizes, *held_out_lines(self.apart)]))
        for part in (judged, *self.apart.values()):
            record_skips(console, part.skipped)

    def foresee(self, console: Console) -> None:
        """Say what rows and model let one expect, and which answers the base finds likelier."""
        super().foresee(console)
        known = self.train
        if self.reference is None:
            return
        score = known.judged.score(known.reference, known.reference, self.recipe)
        if "prefers" in score.values:
            share, (low, high) = score.values["prefers"], score.intervals["prefers"]
            console.field(
                "base",
                f"gives the chosen answer the higher probability in {share:.0%} of the pairs "
                f"({low:.0%} to {high:.0%}) before training",
            )

    def commands(self, run: str) -> list[str]:
        """Return what to type next; `run` is the folder, quoted."""
        whole = self.recipe.method in methods.IN_PLACE
        last = f"deltaw merge {run} OUT" if whole else f"deltaw export {run} OUT --to hf"
        return [f"deltaw eval {run}", f"deltaw chat {run}", last]


Made = TypeVar("Made", bound=JudgedJob)
Encode = Callable[[Encoder, Sequence[Any], Corpus], Judged]


def prepare_judged(
    recipe: Recipe, console: Console, encode: Encode, kind: type[Made], weigh: Weigh
) -> Made:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `encode` makes tokens of one part of the corpus, `kind` is the job that they are for; `weigh`
    says what memory it takes, before any weight is read.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    opening = begin(recipe, console, kind.metrics)
    parts = _parts(opening, encode, console)
    train, validation, test = ([(length, 0) for length in part.lengths()] for part in parts)
    seen = train if parts[0].refers(recipe) else []
    weigh(console, outlook(recipe, opening.model, train, [*validation, *test], seen))
    model = load_model(recipe)
    stop_at(model, opening.encoder.end_ids)
    base = base_digest(model)
    padding = Padding(opening.tokenizer.pad_token_id)
    first = first_batches(recipe, parts[0].better(), padding)
    adapted = methods.adapt(model, recipe, (), first, loss_of)
    if isinstance(model.get_output_embeddings(), AdaptedLayer):
        raise ConfigError(
            "TRL's loss of preferences reads past an adapter on the output head.\n"
            "Fix: leave it out of target_modules, or train the head in full (modules_to_save)."
        )
    frozen = recipe.method not in methods.IN_PLACE and not recipe.absorb
    start = "the model with its adapters off" if frozen else "the model as it starts"
    if frozen and recipe.merged:
        start += " and the given ones merged"
    reference = start if parts[0].refers(recipe) else None
    place(model)
    with deltaw.disabled(model) if frozen else nullcontext():
        known, *held = (_known(part, model, padding, reference) for part in parts)
    assert known is not None
    plan = planned(recipe, len(known.judged), shape(model.config), recipe.metric or "loss")
    return kind(
        recipe=opening.recorded(plan, base, adapted),
        model=model,
        tokenizer=opening.tokenizer,
        plan=plan,
        adapted=adapted,
        warnings=adapted.warnings,
        held_out_name="validation" if held[1] is None else "test",
        corpus=opening.corpus,
        train=known,
        validation=held[0],
        held_out=held[1] or held[0],
        apart={"validation": parts[1], "test": parts[2]},
        padding=padding,
        template=opening.template,
        encoder=opening.encoder,
        reference=reference,
        console=console,
    )


def _parts(opening: Opening, encode: Encode, console: Console) -> list[Judged]:
    """Return training, validation and test part as tokens, the first as it is trained on."""
    recipe, corpus = opening.recipe, opening.corpus
    train, validation, test = (
        encode(opening.encoder, part, corpus)
        for part in (corpus.train, corpus.validation, corpus.test)
    )
    if not len(train):
        raise DataError("\n".join(["Nothing can be trained on.", *skips(train.skipped)]))
    require_scored(recipe, len(corpus.validation), len(validation), validation.skipped, console)
    return [train.batched(recipe), validation, test]


def _known(part: Judged, model: nn.Module, padding: Padding, reference: str | None) -> Known | None:
    if not len(part):
        return None
    said = np.zeros((len(part), 2)) if reference is None else part.log_p(model, padding)
    return Known(part, said)


def _named(reference: str | None) -> str:
    return "there is no reference" if reference is None else f"the reference is {reference}"


def _as_data(known: Known) -> Dataset:
    return Dataset.from_dict(known.judged.as_data(known.reference))
