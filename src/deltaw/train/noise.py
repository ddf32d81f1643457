"""Noise on what the input embeddings return, while a model is trained.

Source: NEFTune, arXiv 2310.05914.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

from torch import Tensor, empty_like, nn

from deltaw.errors import ConfigError
from deltaw.train.recipe import Recipe

TWO_STACKS = (
    "neftune_noise_alpha: encoder and decoder share one embedding, and it is for one reader"
)


def require_one_stack(recipe: Recipe, model: Any) -> None:
    """Raise `ConfigError` if noise is asked for on embeddings that two stacks read."""
    if recipe.neftune_noise_alpha and model.config.is_encoder_decoder:
        raise ConfigError(f"{TWO_STACKS}.\nFix: leave it out.")


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """Add uniform noise in ±alpha / √(L d) to the embeddings of a model that trains, in the block.

    L is how long the rows of the batch are with their padding, as in transformers; in the paper it
    is the length of each row without it. A model in evaluation mode is left alone.
    """
    if not alpha:
        yield
        return

    def add(embedding: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not embedding.training:
            return output
        bound = alpha / sqrt(output.shape[-2] * output.shape[-1])
        return output + empty_like(output).uniform_(-bound, bound)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
