"""Direct preference optimisation: the reference is the same model with its adapters off.

Source: arXiv 2305.18290; through `trl.DPOTrainer`. What the reference says of every pair is
computed once before training, so that neither a second model nor a second pass per step is needed.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import deltaw
from deltaw.errors import ConfigError, DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.corpus import load as load_corpus
from deltaw.language.data.samples import Preference
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.templating import Chosen, choose
from deltaw.language.loading import load, outline
from deltaw.language.memory.outlook import outlook
from deltaw.language.memory.weighing import Weigh, weigh
from deltaw.language.reading import encoder_of, request, require_validation
from deltaw.language.training.pairs import Floats, Pair, encode, preferred, score
from deltaw.language.training.prepare import first_batches, loss_of
from deltaw.language.training.receipt import show_corpus, skips
from deltaw.layer import AdaptedLayer
from deltaw.train import methods
from deltaw.train.choices import check_reports, chosen, recorded_recipe
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.identity import base_digest, tokenizer_digest
from deltaw.train.interrupt import Interrupt
from deltaw.train.job import Job
from deltaw.train.loop import RecipeTrainer, arguments
from deltaw.train.metrics import Score
from deltaw.train.model import hidden_size
from deltaw.train.progress import ProgressBar
from deltaw.train.rates import planned
from deltaw.train.recipe import Recipe

PROBE = 2


@dataclass(frozen=True)
class Judged:
    """Pairs, and log p of their answers under the reference, (pairs, 2)."""

    pairs: list[Pair]
    reference: Floats

    def score(self, model: nn.Module, padding: Padding, beta: float) -> Score:
        """Return how the model stands to the reference on these pairs."""
        return score(preferred(model, self.pairs, padding), self.reference, beta)

    def as_data(self) -> Dataset:
        """Return the pairs as TRL reads them."""
        rows = [pair.as_data() for pair in self.pairs]
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        for number, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            columns[name] = self.reference[:, number].astype("float32")
        return Dataset.from_dict(columns)


class PreferenceTrainer(RecipeTrainer, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` by a recipe, over pairs whose reference is known."""

    judged: Judged
    padding: Padding
    longest_first = True

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _lengths(self) -> list[int]:
        columns = [self.train_dataset[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
        return [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; raise `DivergedError` on a loss that is no number."""
        began = time.perf_counter()
        found = self.judged.score(self.model, self.padding, self.beta)
        self.require_finite(torch.tensor(found.value), "eval_loss", self.state.global_step)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in found.values.items()}
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - began, 4)
        return EvalLoopOutput(None, None, metrics, found.rows)


@dataclass(frozen=True)
class PreferenceJob(Job):
    """Prompts with a better and a worse answer each."""

    corpus: Corpus
    train: Judged
    validation: Judged | None
    held_out: Judged | None
    padding: Padding
    template: Chosen
    found: str

    @property
    def rows(self) -> int:
        """How many pairs are trained on."""
        return len(self.train.pairs)

    @property
    def validated(self) -> bool:
        """Whether there are validation pairs."""
        return self.validation is not None

    @property
    def tested(self) -> bool:
        """Whether there is a test part beside the validation part."""
        return bool(self.corpus.test)

    def trainer(self, folder: Path, interrupt: Interrupt, progress: ProgressBar) -> RecipeTrainer:
        """Return the Trainer, its optimiser built."""
        recipe = self.recipe
        metric = self.plan.metric if self.validated else None
        args = arguments(DPOConfig, recipe, folder, self.plan, metric)
        args.beta = recipe.pref_beta
        args.loss_type = [recipe.pref_loss]
        args.label_smoothing = recipe.dpo_label_smoothing
        args.precompute_ref_log_probs = True
        args.max_length = None
        trainer = PreferenceTrainer(
            model=self.model,
            args=args,
            train_dataset=self.train.as_data(),
            eval_dataset=None if self.validation is None else self.validation.as_data(),
            data_collator=DataCollatorForPreference(self.padding.pad),
            processing_class=self.tokenizer,
        )
        if self.validation is not None:
            trainer.judged = self.validation
        trainer.padding = self.padding
        trainer.made_for(recipe, interrupt, progress)
        return trainer

    def probe(self, trainer: RecipeTrainer) -> dict[str, Any]:
        """Return a few rows on which the adapters are tried, computed as in training."""
        rows = [side for pair in self.train.pairs[:PROBE] for side in (pair.chosen, pair.rejected)]
        batch = self.padding([{"input_ids": r.input_ids, "labels": r.labels} for r in rows])
        return {**batch, "use_cache": False, "fused_lm_head": True}

    def score(self) -> Score | None:
        """Return the model's score on the held-out pairs, if there are any."""
        if self.held_out is None:
            return None
        return self.held_out.score(self.model, self.padding, self.recipe.pref_beta)

    def show_rows(self, console: Console) -> None:
        """Say how many pairs there are and what they are compared by."""
        console.field("template", self.template.origin)
        console.field("pairs", self.found)

    def commands(self, run: str) -> list[str]:
        """Return what to type next; `run` is the folder, quoted."""
        return [f"deltaw chat {run}", f"deltaw inspect {run}"]


def prepare(recipe: Recipe, console: Console, *, weigh: Weigh = weigh) -> PreferenceJob:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `weigh` says what memory it takes, before any weight is read.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    methods.lora_config(recipe)
    check_reports(recipe)
    corpus = load_corpus(request(recipe))
    show_corpus(console, corpus)
    require_validation(recipe, corpus)
    seen = outline(recipe)
    tokenizer = seen.tokenizer
    template = choose(tokenizer, recipe.template)
    tokenizer.chat_template = template.template.source
    encoder = encoder_of(recipe, tokenizer, template, seen.model)
    parts = [encode(encoder, _preferences(part, corpus)) for part in _parts(corpus)]
    if not parts[0].pairs:
        raise DataError("\n".join(["No pair can be trained on.", *skips(parts[0].skipped)]))
    sides = [(pair.chosen, pair.rejected) for pair in parts[0].pairs]
    lengths = [max(len(row.input_ids) for row in pair) for pair in sides]
    weigh(console, outlook(recipe, seen.model, lengths, lengths))
    model = load(recipe).model
    base = base_digest(model)
    padding = Padding(tokenizer.pad_token_id)
    better = [pair.chosen for pair in parts[0].pairs]
    first = first_batches(recipe, better, padding)
    adapted, warnings = methods.adapt(model, recipe, (), first, loss_of)
    if isinstance(model.get_output_embeddings(), AdaptedLayer):
        raise ConfigError(
            "TRL's loss of preferences reads past an adapter on the output head.\n"
            "Fix: leave it out of target_modules, or train the head in full (modules_to_save)."
        )
    frozen = recipe.method not in methods.IN_PLACE and not recipe.absorb
    with deltaw.disabled(model) if frozen else nullcontext():
        known = [
            Judged(part.pairs, preferred(model, part.pairs, padding)) if part.pairs else None
            for part in parts
        ]
    train, validation, test = known
    assert train is not None
    plan = planned(recipe, len(train.pairs), hidden_size(model.config), recipe.metric or "loss")
    recorded = recorded_recipe(
        recipe,
        {"max_length": encoder.max_length} | chosen(recipe, plan),
        corpus.hashes,
        base=base,
        tokenizer=tokenizer_digest(tokenizer),
    )
    reference = "the model with its adapters off" if frozen else "the model as it starts"
    found = [f"{counted(len(train.pairs), 'pair')}; the reference is {reference}"]
    found += [f"{counted(parts[0].cut, 'answer')} cut"] if parts[0].cut else []
    return PreferenceJob(
        recipe=recorded,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        adapted=adapted,
        warnings=warnings,
        held_out_name="validation" if test is None else "test",
        corpus=corpus,
        train=train,
        validation=validation,
        held_out=test or validation,
        padding=padding,
        template=template,
        found="\n".join([*found, *skips(parts[0].skipped)]),
    )


def _parts(corpus: Corpus) -> tuple[tuple[Any, ...], ...]:
    return corpus.train, corpus.validation, corpus.test


def _preferences(samples: tuple[Any, ...], corpus: Corpus) -> list[Preference]:
    if not all(isinstance(sample, Preference) for sample in samples):
        raise DataError(
            f"{corpus.origins[0].schema.reasons}\ntask=dpo learns from pairs of a better and a "
            "worse answer.\nFix: name their columns (columns.chosen, columns.rejected), or leave "
            "task out."
        )
    return list(samples)
