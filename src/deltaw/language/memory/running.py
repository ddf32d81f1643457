"""The run of a recipe on tensors without memory: what all kinds of training have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaw.analysis.memory.packing import Packing
from deltaw.analysis.memory.runs import RATE, Run
from deltaw.attaching import attach
from deltaw.config import LoraConfig
from deltaw.inits import at_zero
from deltaw.language.memory.shapes import Batches
from deltaw.optim.galore import GaLoreAdamW
from deltaw.recomputing import recompute
from deltaw.train import methods
from deltaw.train.continuing import ADAPTER
from deltaw.train.optimizer import optimizer_groups
from deltaw.train.recipe import Recipe


class RecipeRun(Run):
    """What `deltaw train` does, by the recipe's method, optimiser and precision.

    A start that comes from data or packed weights is replaced by the usual one, which is as large.
    An adapter that is trained on has the shapes that its settings give. Reading data has left holes
    in the heap that hold what the first step makes once.
    """

    restores = True
    runtime = 0
    gradients = 0
    """The bytes of all gradients, known when the model is adapted."""

    def __init__(
        self, recipe: Recipe, batches: Batches, settings: LoraConfig | None = None
    ) -> None:
        plain = {"absorb": False, "init_lora_weights": True}
        keeps = recipe.method != "lora" or at_zero(recipe.init_lora_weights)
        self.recipe = recipe if keeps else recipe.model_copy(update=plain)
        self.batches = batches
        self.settings = settings if recipe.goes_on else None
        kept = recipe.modules_to_save if self.settings is None else self.settings.modules_to_save
        if recipe.quantization_bit == 4:
            self.packs = Packing(recipe.quantization_type, recipe.double_quantization, kept or ())
        self.passes = recipe.gradient_accumulation
        self.clips = recipe.max_grad_norm > 0 and not recipe.updates_in_backward
        self.autocast = recipe.bf16
        if "8bit" in recipe.optim:  # what it makes once and keeps must be real
            GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "rank": 1, "optim_bits": 8}])

    def adapt(self, model: Any) -> None:
        """Adapt the model by the recipe."""
        if self.settings is None:
            methods.prepare(model, self.recipe)
        else:
            attach(model, self.settings, ADAPTER)
        model.train()
        if self.recipe.gradient_checkpointing:
            recompute(model)
        self.gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the recipe's optimiser."""
        groups = optimizer_groups(model, self.recipe, RATE)
        if self.recipe.uses_galore:
            return GaLoreAdamW(groups, RATE, layerwise=self.recipe.updates_in_backward)
        return torch.optim.AdamW(groups, lr=RATE, fused=True)


def tokens(model: Any, rows: int, length: int) -> Tensor:
    """Return random tokens of a model, (rows, length)."""
    return torch.randint(model.get_input_embeddings().num_embeddings, (rows, length))


def read(model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Return random tokens that are read under a mask, each (rows, length)."""
    mask = torch.ones((rows, length), dtype=torch.long)
    return {"input_ids": tokens(model, rows, length), "attention_mask": mask}
