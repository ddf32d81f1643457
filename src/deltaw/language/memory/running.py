"""The run of a recipe as TRL's trainers do it, on tensors without memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from trl.trainer import utils as trl

from deltaw.analysis.memory.packing import Packing
from deltaw.analysis.memory.runs import RATE, Run
from deltaw.inits import at_zero
from deltaw.language import scores
from deltaw.layer import AdaptedLayer
from deltaw.optim.galore import GaLoreAdamW
from deltaw.recomputing import recompute
from deltaw.train import methods
from deltaw.train.batches import EpochSampler
from deltaw.train.optimizer import optimizer_groups
from deltaw.train.recipe import Recipe

OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What TRL's trainer asks the fused output head for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The rows of a batch, and their longest."""

    rows: int
    tokens: int

    @property
    def size(self) -> int:
        """How many tokens it has, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True, slots=True)
class Batches:
    """The largest batch that is trained on, and the largest that is scored, if any is."""

    trained: Shape
    scored: Shape | None = None


def batches_of(
    recipe: Recipe, trained: Sequence[int], scored: Sequence[int], vocabulary: int
) -> Batches:
    """Return the largest batches of rows with these lengths."""
    order = EpochSampler(
        trained,
        recipe.batch_size,
        recipe.seed,
        bucketed=recipe.group_by_length,
        longest_first=True,
    )
    rows, size = [trained[index] for index in order], recipe.batch_size
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    held = [[scored[index] for index in part] for part in scores.batches(scored, vocabulary)]
    return Batches(_largest(parts), _largest(held) if held else None)


def _largest(parts: Sequence[Sequence[int]]) -> Shape:
    return max((Shape(len(part), max(part)) for part in parts), key=lambda shape: shape.size)


class RecipeRun(Run):
    """What `deltaw train` does, by the recipe's method, optimiser and precision.

    A start that comes from data or packed weights is replaced by the usual one, which is as large.
    Reading data has left holes in the heap that hold what the first step makes once.
    """

    restores = True
    runtime = 0

    def __init__(self, recipe: Recipe, batches: Batches) -> None:
        plain = {"absorb": False, "init_lora_weights": True}
        keeps = recipe.method != "lora" or at_zero(recipe.init_lora_weights)
        self.recipe = recipe if keeps else recipe.model_copy(update=plain)
        self.batches = batches
        if recipe.quantization_bit == 4:
            self.packs = Packing(
                recipe.quantization_type, recipe.double_quantization, recipe.modules_to_save or ()
            )
        self.passes = recipe.gradient_accumulation
        self.clips = recipe.max_grad_norm > 0 and not recipe.updates_in_backward
        self.autocast = recipe.bf16
        if "8bit" in recipe.optim:  # what it makes once and keeps must be real
            GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "rank": 1, "optim_bits": 8}])

    def adapt(self, model: Any) -> None:
        """Adapt the model by the recipe, and give it TRL's output head."""
        methods.prepare(model, self.recipe)
        model.train()
        trl.add_fused_lm_head(model, outputs=OUTPUTS)
        if self.recipe.gradient_checkpointing:
            recompute(model)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the recipe's optimiser."""
        groups = optimizer_groups(model, self.recipe, RATE, ())
        if self.recipe.uses_galore:
            return GaLoreAdamW(groups, RATE, layerwise=self.recipe.updates_in_backward)
        return torch.optim.AdamW(groups, lr=RATE, fused=True)

    def loss(self, model: Any) -> Tensor:
        """Return the loss of the largest batch; pairs of answers are two rows each."""
        shape = self.batches.trained
        batch = self._batch(
            model, Shape(shape.rows * (1 + (self.recipe.task == "dpo")), shape.tokens)
        )
        if isinstance(model.get_output_embeddings(), AdaptedLayer):
            loss: Tensor = model(**batch, use_cache=False)["loss"]
            return loss
        log_probs: Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
        return -log_probs.sum() / shape.size

    def between(self, model: Any) -> None:
        """Score the largest batch of held-out rows."""
        if self.batches.scored is None:
            return
        batch = self._batch(model, self.batches.scored, packed=False)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            scores.of_batch(model, batch)
        model.train()

    def _batch(self, model: Any, shape: Shape, packed: bool | None = None) -> dict[str, Tensor]:
        size = (shape.rows, shape.tokens)
        ids = torch.randint(model.get_input_embeddings().num_embeddings, size)
        if self.recipe.packing if packed is None else packed:
            positions = torch.arange(shape.tokens).repeat(shape.rows, 1)
            return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
        mask = torch.ones(size, dtype=torch.long)
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}
