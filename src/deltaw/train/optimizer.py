"""How a recipe's weights move: parameter groups, and AdamW or GaLore over them."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from deltaw.optim import Group, decays, galore, grouped, layerwise, loraplus
from deltaw.train.recipe import Recipe


def optimizer_groups(model: nn.Module, recipe: Recipe, rate: float) -> list[Group]:
    """Return the parameter groups of a recipe; matrices decay, vectors do not.

    Raises:
        StateError, TargetError: if the model has nothing that LoRA+, GaLore or rates by layer
            could act on.
    """
    rates: dict[nn.Parameter, float] = {}
    factors: dict[nn.Parameter, float] = {}
    projected: set[nn.Parameter] = set()
    if recipe.loraplus_lr_ratio is not None:
        rates = loraplus.rates(model, rate, recipe.loraplus_lr_ratio, recipe.loraplus_lr_embedding)
    if recipe.lr_layer_decay is not None:
        factors = layerwise.factors(model, recipe.lr_layer_decay)
    if recipe.uses_galore:
        projected = set(galore.projected(model, recipe.galore_rank, recipe.galore_target))
    settings = {
        "rank": recipe.galore_rank,
        "update_proj_gap": recipe.galore_update_interval,
        "scale": recipe.galore_scale,
        "proj_type": recipe.galore_proj_type,
        "exact_svd": recipe.galore_exact_svd,
        "optim_bits": 8 if "8bit" in recipe.optim else 32,
    }

    def options(name: str, parameter: nn.Parameter) -> Group:
        plain = {
            "lr": rates.get(parameter, rate) * factors.get(parameter, 1.0),
            "weight_decay": recipe.weight_decay if decays(name, parameter) else 0.0,
        }
        return plain | settings if parameter in projected else plain

    return grouped(model, options)


def galore_optimizer(groups: list[Group], recipe: Recipe, args: Any) -> Optimizer:
    """Return GaLore over these groups, with the Trainer's constants of Adam."""
    return galore.GaLoreAdamW(
        groups,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        layerwise=recipe.updates_in_backward,
    )


def movement(recipe: Recipe) -> str:
    """Return how the recipe's weights move, to be put behind what is trained."""
    if recipe.loraplus_lr_ratio is not None:
        return f", B at {recipe.loraplus_lr_ratio:g} times the rate (LoRA+)"
    if not recipe.uses_galore:
        return ""
    text = f", matrices by GaLore at rank {recipe.galore_rank}"
    if recipe.updates_in_backward:
        text += ", in the backward pass and so without a limit on the gradient's norm"
    return text
