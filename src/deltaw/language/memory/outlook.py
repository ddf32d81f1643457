"""A recipe before it is run: what its model, its rows and its method will take of memory."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deltaw.analysis.memory.estimate import Estimate, estimate_run
from deltaw.analysis.memory.headers import Weights, read_headers
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, DeltawError, RunError
from deltaw.language.memory.labelling import TextRun
from deltaw.language.memory.running import RecipeRun
from deltaw.language.memory.shapes import Batches, Shape, Sides, of_answers, of_texts
from deltaw.train.continuing import last_settings
from deltaw.train.distributed.processes import count
from deltaw.train.methods import IN_PLACE, weight_dtype
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
    """A recipe, its model without memory, the headers of its weights, and its largest batches.

    So many `processes` share every batch; what is said is of each of them. `settings` are those of
    the last adapter that the run begins with; those of merged ones, which are small, are left out.
    """

    recipe: Recipe
    model: nn.Module
    weights: Weights | None
    batches: Batches
    processes: int = 1
    settings: LoraConfig | None = None

    def with_recipe(self, batches: Batches | None = None, **changes: Any) -> "Outlook":
        """Return the outlook of another recipe, whose largest batches may be others too."""
        recipe = self.recipe.model_copy(update=changes)
        return replace(self, recipe=recipe, batches=batches or self.batches)

    @property
    def trained(self) -> Shape:
        """The largest share of a batch."""
        return self.batches.trained.shared_by(self.processes)

    def estimate(self) -> Estimate:
        """Return the peak memory of the run.

        Raises:
            DeltawError: if it cannot be estimated.
        """
        bit, method = self.recipe.quantization_bit, self.recipe.quantization_method
        if bit is not None and (bit, method) != (4, "bnb"):
            raise ConfigError(f"weights in {bit} bits of {method} are not in the estimate")
        if self.recipe.fsdp and self.processes > 1:
            raise ConfigError("weights that are shared out (fsdp) are not in the estimate")
        model = copy.deepcopy(self.model).to(self._dtype())
        try:
            batches = replace(self.batches, trained=self.trained)
            run = self._kind()(self.recipe, batches, self.settings)
            found = estimate_run(model, run, self.weights, device())
        except DeltawError:
            raise
        except Exception as error:  # a model's own code may need values, which there are none of
            first = (str(error).strip().splitlines() or [""])[0]
            raise RunError(f"{type(error).__name__}: {first}") from error
        exchanged = run.gradients if self.processes > 1 else 0
        return Estimate({**found.parts, "buckets": exchanged})

    def _kind(self) -> type[RecipeRun]:
        if not self.recipe.is_language:
            return TextRun
        from deltaw.language.memory.answering import CausalRun, Seq2SeqRun  # imports TRL

        apart = self.model.config.is_encoder_decoder  # type: ignore[union-attr]
        return Seq2SeqRun if apart else CausalRun

    def floor(self) -> int:
        """Return bytes that the weights alone surely take; those in 4 bits take half of one."""
        numbers = sum(p.numel() for p in self.model.parameters())
        packed = self.recipe.quantization_bit is not None
        return numbers // 2 if packed else numbers * self._dtype().itemsize

    def _dtype(self) -> torch.dtype:
        return weight_dtype(self.recipe) if self.recipe.is_language else torch.float32

    def ceiling(self) -> int:
        """Return bytes that the run surely stays below, without an estimate.

            b P + 24 (tokens Σ (in + out) + scored tokens max (in + out))
                + 16 (scored tokens · vocabulary + rows · tokens² · heads)

        with b = 30 for trained weights and 12 for frozen ones, sums over all layers; texts with
        labels have no vocabulary to score.
        """
        config = self.model.config.get_text_config()  # type: ignore[operator]
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        trained, nothing = self.trained, Shape(0, 0)
        held = (self.batches.scored or nothing, self.batches.known or nothing)
        scored = max(held, key=lambda shape: shape.size)
        rows = trained.rows * (1 + (self.recipe.task in ("dpo", "kto")))
        sizes = [sum(p.shape) for p in matrices]
        features = rows * trained.length * sum(sizes) + scored.size * max(sizes)
        heads = getattr(config, "num_attention_heads", 1)
        layers = getattr(config, "num_hidden_layers", 1)
        seen = rows * trained.length**2 * layers + scored.rows * scored.length**2
        said = scored.size * config.vocab_size if self.recipe.is_language else 0
        return (
            PARAMETER[self.recipe.method in IN_PLACE] * sum(p.numel() for p in matrices)
            + FEATURE * features
            + SCORE * (said + seen * heads)
            + PROCESS
        )


def outlook(
    recipe: Recipe,
    model: nn.Module,
    trained: Sequence[Sides],
    scored: Sequence[Sides],
    known: Sequence[Sides] = (),
) -> Outlook:
    """Return the outlook of a recipe from its model on the meta device and the sizes of its rows.

    `scored` are those scored while it is trained, `known` those that are scored before.
    Of the weights only the headers are read, if they are safetensors files; without them the
    weights count as converted when they are loaded.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    batches = of_answers(recipe, trained, scored, known, vocabulary)
    return Outlook(recipe, model, _headers(recipe), batches, count(), last_settings(recipe))


def text_outlook(
    recipe: Recipe, model: nn.Module, trained: Sequence[int], scored: Sequence[int]
) -> Outlook:
    """Return the same of labelled texts, from how many tokens each has."""
    batches = of_texts(recipe, trained, scored)
    return Outlook(recipe, model, _headers(recipe), batches, count(), last_settings(recipe))


def _headers(recipe: Recipe) -> Weights | None:
    try:
        return read_headers(recipe.model, recipe.revision)
    except DeltawError:
        return None


def device() -> str:
    """Return where the model will be trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"
