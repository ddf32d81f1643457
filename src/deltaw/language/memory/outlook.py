"""A recipe before it is run: what its model, its rows and its method will take of memory."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.analysis.memory.estimate import Estimate, estimate_run
from deltaw.analysis.memory.headers import Weights, read_headers
from deltaw.errors import ConfigError, DeltawError, RunError
from deltaw.language.loading import weight_dtype
from deltaw.language.memory.running import Batches, RecipeRun, batches_of
from deltaw.train.methods import IN_PLACE
from deltaw.train.recipe import Recipe

PARAMETER = {True: 30, False: 12}
"""Bytes that a parameter takes at most, where it is trained and where it is frozen."""
FEATURE = 24
"""Bytes that a number takes at most that goes into a layer or comes out of one."""
SCORE = 16
"""Bytes that a number takes at most of logits that are scored, and of attention."""
PROCESS = 200 << 20


@dataclass(frozen=True)
class Outlook:
    """A recipe, its model without memory, the headers of its weights, and its largest batches."""

    recipe: Recipe
    model: nn.Module
    weights: Weights | None
    batches: Batches

    def with_recipe(self, batches: Batches | None = None, **changes: Any) -> "Outlook":
        """Return the outlook of another recipe, whose largest batches may be others too."""
        recipe = self.recipe.model_copy(update=changes)
        return Outlook(recipe, self.model, self.weights, batches or self.batches)

    def estimate(self) -> Estimate:
        """Return the peak memory of the run.

        Raises:
            DeltawError: if it cannot be estimated.
        """
        bit, method = self.recipe.quantization_bit, self.recipe.quantization_method
        if bit is not None and (bit, method) != (4, "bnb"):
            raise ConfigError(f"weights in {bit} bits of {method} are not in the estimate")
        if self.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise ConfigError("sequence-to-sequence models are not in the estimate")
        if self.recipe.task == "kto":
            raise ConfigError("rated answers (task=kto) are not in the estimate")
        model = copy.deepcopy(self.model).to(weight_dtype(self.recipe))
        try:
            run = RecipeRun(self.recipe, self.batches)
            return estimate_run(model, run, self.weights, device())
        except DeltawError:
            raise
        except Exception as error:  # a model's own code may need values, which there are none of
            first = (str(error).strip().splitlines() or [""])[0]
            raise RunError(f"{type(error).__name__}: {first}") from error

    def ceiling(self) -> int:
        """Return bytes that the run surely stays below, without an estimate.

            b P + 24 tokens Σ (in + out) + 16 (scored tokens · vocabulary + rows · tokens² · heads)

        with b = 30 for trained weights and 12 for frozen ones, sums over all layers.
        """
        config = self.model.config.get_text_config()  # type: ignore[operator]
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        trained = self.batches.trained
        rows = trained.rows * (1 + (self.recipe.task in ("dpo", "kto")))
        features = sum(sum(p.shape) for p in matrices)
        heads = getattr(config, "num_attention_heads", 1) * getattr(config, "num_hidden_layers", 1)
        scored = 0 if self.batches.scored is None else self.batches.scored.size
        return (
            PARAMETER[self.recipe.method in IN_PLACE] * sum(p.numel() for p in matrices)
            + FEATURE * rows * trained.tokens * features
            + SCORE * (scored * config.vocab_size + rows * trained.tokens**2 * heads)
            + PROCESS
        )


def outlook(
    recipe: Recipe, model: nn.Module, trained: Sequence[int], scored: Sequence[int]
) -> Outlook:
    """Return the outlook of a recipe from its model on the meta device and the lengths of its rows.

    Of the weights only the headers are read, if they are safetensors files; without them the
    weights count as converted when they are loaded.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    try:
        weights = read_headers(recipe.model, recipe.revision)
    except DeltawError:
        weights = None
    return Outlook(recipe, model, weights, batches_of(recipe, trained, scored, vocabulary))


def device() -> str:
    """Return where the model will be trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"
