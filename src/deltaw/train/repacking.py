"""A run's adapter merged into weights that stay packed, as transformers stores them."""

from typing import Any

import torch
import transformers
from torch import nn

import deltaw
from deltaw.errors import ConfigError
from deltaw.layer import AdaptedLayer
from deltaw.quant import storage_of
from deltaw.train.packing import packing
from deltaw.train.recipe import Recipe
from deltaw.unpacking import usual_dtype


def require_repacking(recipe: Recipe | None, dtype: str | None) -> None:
    """Raise `ConfigError` unless the merged weights of this run can be written packed again."""
    kind = None if recipe is None else packing(recipe)
    if kind is None:
        raise ConfigError(
            "--requantize has no effect: the weights that were trained on are not packed.\n"
            "Fix: leave it out; transformers can pack the merged model when it loads it."
        )
    if kind.startswith("torchao"):
        raise ConfigError(
            f"--requantize cannot pack merged weights as {kind} again.\n"
            "Fix: leave it out; torchao can pack the merged model when it is loaded."
        )
    if dtype is not None:
        raise ConfigError(
            "--requantize packs the merged weights, which have no dtype then.\n"
            "Fix: leave --requantize or --dtype out."
        )


def repack(model: nn.Module, recipe: Recipe) -> None:
    """Merge the adapter for good into packed weights and take it off, in place.

    W + ΔW is rounded to the codes of the packing again. The configuration then says how the weights
    are packed, so that `save_pretrained` writes what `from_pretrained` reads.

    Raises:
        MergeError: if the adapter cannot be merged.
    """
    deltaw.merge(model, original="none", requantize=adapts_packed(model))
    deltaw.detach(model)
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and storage_of(module) is None
    ]
    settings: Any = model.config
    settings.quantization_config = _described(recipe, dense, usual_dtype(model))


def adapts_packed(model: nn.Module) -> bool:
    """Tell whether an adapter is on a packed weight, and not beside them alone, as a head is."""
    return any(isinstance(m, AdaptedLayer) and m.storage is not None for m in model.modules())


def _described(recipe: Recipe, dense: list[str], dtype: torch.dtype) -> Any:
    if packing(recipe) == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=dense)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=dense,
        bnb_4bit_quant_type=packing(recipe),
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
