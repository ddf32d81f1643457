"""Trainers of language models with our checkpoints, order of rows, optimiser and scores."""

import time
from types import MappingProxyType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from deltaw.language import scores
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.examining import Examination
from deltaw.language.training.each_set import Sets, losses
from deltaw.layer import AdaptedLayer
from deltaw.train.batches import padded_tokens
from deltaw.train.distributed.shares import WEIGHT
from deltaw.train.interrupt import Interrupt
from deltaw.train.loop import RecipeTrainer
from deltaw.train.recipe import Recipe


class AnswerTrainer(RecipeTrainer):
    """A Trainer by a recipe whose validation loss is a mean over tokens, not over batches."""

    judged: list[Row]
    sets: Sets = MappingProxyType({})
    examination: Examination | None = None
    longest_first = True
    loss_over = "items"

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; raise `DivergedError` on a loss that is no number."""
        began = time.perf_counter()
        padding = self.data_collator
        assert isinstance(padding, Padding)
        found = scores.measured(self.model, self.judged, padding)
        sums = found.sum(0)
        loss = sums[0] / sums[1]
        self.require_finite(torch.tensor(loss), "eval_loss", self.state.global_step)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in scores.ratios(sums).items()}
        for name, value in losses(self.sets, found).items():
            metrics[f"{prefix}_{name}"] = value
        if self.examination is not None:
            for name, tally in self.examination.sit().items():
                metrics[f"{prefix}_{name}"] = tally.value
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - began, 4)
        return EvalLoopOutput(None, None, metrics, len(self.judged))


class LanguageTrainer(AnswerTrainer, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` by a recipe."""

    @property
    def through_logits(self) -> bool:
        """Whether the output head has an adapter, past which TRL's fused loss would read."""
        return isinstance(self.model.get_output_embeddings(), AdaptedLayer)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss per learnt token of the whole step."""
        if self.through_logits:
            weight = inputs.pop(WEIGHT, 1.0)
            inputs["use_cache"] = False
            return weight * Trainer.compute_loss(self, model, inputs, *args, **kwargs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _lengths(self) -> list[int]:
        return [len(ids) for ids in self.train_dataset["input_ids"]]


class Seq2SeqTrainer(AnswerTrainer):
    """`transformers.Trainer` by a recipe, of prompts that are read and answers that are learnt."""

    def made_for(self, recipe: Recipe, interrupt: Interrupt, progress: TrainerCallback) -> None:
        """Follow this recipe; losses are scaled here, whatever the model's own forward takes."""
        super().made_for(recipe, interrupt, progress)
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: Any, *_: Any, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """Return the loss per learnt token of the whole step.

        `L = Σ_b n_b mean_b / Σ_b n_b` over the batches of a step; the model gives the means.
        """
        learnt = (inputs["labels"] != MASKED).sum()
        mean = super().compute_loss(model, {**inputs, "use_cache": False})
        if num_items_in_batch is None:
            return mean
        return mean * learnt * self.accelerator.num_processes / num_items_in_batch

    def padded(self) -> list[int]:
        """Return how many tokens each batch of an epoch has, with the padding of both sides."""
        sides = (padded_tokens(self.order(), side) for side in self._sides())
        return [sum(sizes) for sizes in zip(*sides, strict=True)]

    def _lengths(self) -> list[int]:
        return [sum(sizes) for sizes in zip(*self._sides(), strict=True)]

    def _sides(self) -> list[list[int]]:
        return [[len(ids) for ids in self.train_dataset[name]] for name in ("input_ids", "labels")]
