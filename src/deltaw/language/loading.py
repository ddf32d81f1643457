"""Loading a pretrained language model, causal or sequence-to-sequence, with its tokenizer."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from deltaw.errors import ConfigError, RunError
from deltaw.train.escape import printable
from deltaw.train.methods import weight_dtype
from deltaw.train.model import LOADING, cannot_load, load_tokenizer, quiet, refuse_gaps
from deltaw.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load(recipe: Recipe, source: str | None = None) -> Loaded:
    """Return the recipe's base model, or the one in `source`, and its tokenizer.

    Raises:
        ConfigError: if the recipe's task is not for this kind of model.
        RunError: if either cannot be loaded, the weights have gaps, or the tokenizer has more
            tokens than the model, or no token that ends a text.
    """
    name = source or recipe.model
    model = load_model(recipe, source)
    tokenizer = load_tokenizer(
        name,
        model.config,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    _require_fit(tokenizer, model, name)
    return Loaded(model, tokenizer)


def load_model(recipe: Recipe, source: str | None = None) -> nn.Module:
    """Return the recipe's base model, or the one in `source`.

    Raises:
        ConfigError, RunError: as in `load`, but for the tokenizer.
    """
    name = source or recipe.model
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    config = _load_config(name, **where)
    kind = _class_for(config, recipe)
    try:
        with quiet():
            torch.manual_seed(recipe.seed)
            model, loading = kind.from_pretrained(
                name,
                config=config,
                dtype=weight_dtype(recipe),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **where,
            )
    except LOADING as error:
        raise cannot_load(name, error, kind.__name__) from error
    refuse_gaps(model, name, loading, ())
    found: nn.Module = model
    return found


def outline(recipe: Recipe) -> Loaded:
    """Return the recipe's model on the meta device, of which no weight is read, and its tokenizer.

    Raises:
        ConfigError, RunError: as in `load`, but for gaps in the weights.
    """
    name = recipe.model
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    config = _load_config(name, **where)
    kind = _class_for(config, recipe)
    try:
        with quiet(), torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=recipe.trust_remote_code)
    except LOADING as error:
        raise cannot_load(name, error, kind.__name__) from error
    with quiet(), suppress(OSError):  # few models have no such file
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            name, revision=recipe.revision or "main"
        )
    tokenizer = load_tokenizer(name, config, **where)
    _require_fit(tokenizer, model, name)
    return Loaded(model, tokenizer)


def _load_config(name: str, **where: Any) -> Any:
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(name, **where)
    except LOADING as error:
        raise cannot_load(name, error, "AutoModelForCausalLM or AutoModelForSeq2SeqLM") from error


def _class_for(config: Any, recipe: Recipe) -> Any:
    """Return the class that loads the model, by whether it encodes before it decodes."""
    if not config.is_encoder_decoder:
        return transformers.AutoModelForCausalLM
    shown = printable(recipe.model, 200)
    if recipe.task != "sft":
        raise ConfigError(
            f"task={recipe.task}: {shown} is a sequence-to-sequence model ({config.model_type}), "
            "which learns answers alone; comparisons and ratings need a causal one.\n"
            "Fix: task=sft with columns.response naming the answer to learn, or a causal model."
        )
    absent = [
        key
        for key in ("decoder_start_token_id", "pad_token_id")
        if getattr(config, key, None) is None
    ]
    if absent:
        raise RunError(
            f"The configuration of {shown} does not say what its decoder begins with or is padded "
            f"with: no {' and no '.join(absent)}.\nFix: set it in its config.json."
        )
    return transformers.AutoModelForSeq2SeqLM


def _require_fit(tokenizer: Any, model: Any, name: str) -> None:
    shown = printable(name, 200)
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise RunError(
            f"The tokenizer of {shown} has tokens up to number {highest:,}, and the model embeds "
            f"{rows:,}.\nFix: take the tokenizer that the model was trained with, or resize its "
            "embeddings and save it first."
        )
    if tokenizer.eos_token is None:
        raise RunError(
            f"The tokenizer of {shown} has no token that ends a text, so the model could never "
            "learn to stop.\nFix: set eos_token in its tokenizer_config.json."
        )
    if not tokenizer.is_fast and not model.config.is_encoder_decoder:
        raise RunError(
            f"The tokenizer of {shown} does not say where its tokens stand in a text.\n"
            "Fix: save it as a fast one (tokenizer.json)."
        )
