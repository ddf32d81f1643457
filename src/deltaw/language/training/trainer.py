"""TRL's trainer of language models with our checkpoints, order of rows, optimiser and scores."""

import time
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from deltaw.language import scores
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Row
from deltaw.layer import AdaptedLayer
from deltaw.train.loop import RecipeTrainer
from deltaw.train.shares import WEIGHT


class LanguageTrainer(RecipeTrainer, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` by a recipe; the validation loss is a mean over tokens, not over batches."""

    judged: list[Row]
    longest_first = True
    loss_over = "items"

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
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - began, 4)
        return EvalLoopOutput(None, None, metrics, len(self.judged))
