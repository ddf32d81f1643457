"""The runs of language models on tensors without memory, as TRL's and our trainers do them."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils as trl

from deltaw.language import scores
from deltaw.language.memory.running import RecipeRun, read, tokens
from deltaw.language.memory.shapes import Shape
from deltaw.layer import AdaptedLayer

OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What TRL's trainer asks the fused output head for."""


class AnswerRun(RecipeRun):
    """A run whose held-out rows are scored by their tokens."""

    @abstractmethod
    def batch(self, model: Any, shape: Shape) -> dict[str, Tensor]:
        """Return a batch as the model is called on it."""

    def begin(self, model: Any) -> None:
        """Score what the reference says something of."""
        self._score(model, self.batches.known)

    def between(self, model: Any) -> None:
        """Score the largest batch of held-out rows."""
        self._score(model, self.batches.scored)

    def _score(self, model: Any, shape: Shape | None) -> None:
        if shape is None:
            return
        batch = self.batch(model, shape)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            scores.of_batch(model, batch)
        model.train()


class CausalRun(AnswerRun):
    """Training on answers, on pairs of them, or on rated ones."""

    def adapt(self, model: Any) -> None:
        """Adapt the model by the recipe, and give it TRL's output head."""
        super().adapt(model)
        trl.add_fused_lm_head(model, outputs=OUTPUTS)

    def before(self, model: Any) -> None:
        """Compute what rated answers are compared with: as many others."""
        if self.recipe.task == "kto":
            self._log_p(model)

    def loss(self, model: Any) -> Tensor:
        """Return the loss of the largest batch."""
        if isinstance(model.get_output_embeddings(), AdaptedLayer):
            loss: Tensor = model(**self._trained(model), use_cache=False)["loss"]
            return loss
        return -self._log_p(model).sum() / self.batches.trained.size

    def _log_p(self, model: Any) -> Tensor:
        batch = self._trained(model)
        log_probs: Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
        return log_probs

    def _trained(self, model: Any) -> dict[str, Tensor]:
        """Return the largest batch; pairs of answers are two rows each."""
        shape = self.batches.trained
        rows = shape.rows * (1 + (self.recipe.task == "dpo"))
        batch = self.batch(model, Shape(rows, shape.tokens))
        if self.recipe.packing:
            del batch["attention_mask"]
            batch["position_ids"] = torch.arange(shape.tokens).repeat(rows, 1)
        return batch

    def batch(self, model: Any, shape: Shape) -> dict[str, Tensor]:
        """Return tokens of which each is learnt."""
        batch = read(model, shape.rows, shape.tokens)
        return batch | {"labels": batch["input_ids"].clone()}


class Seq2SeqRun(AnswerRun):
    """Training on answers that are apart from what is read."""

    def loss(self, model: Any) -> Tensor:
        """Return the loss of the largest batch."""
        loss: Tensor = model(**self.batch(model, self.batches.trained), use_cache=False)["loss"]
        return loss

    def batch(self, model: Any, shape: Shape) -> dict[str, Tensor]:
        """Return tokens that are read, and those that answer them."""
        labels = tokens(model, shape.rows, shape.answers)
        return read(model, shape.rows, shape.tokens) | {"labels": labels}
