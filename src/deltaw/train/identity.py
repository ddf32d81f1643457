"""Where a run's base model is, and whether it and the tokenizer are still those of the run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from deltaw.errors import RunError
from deltaw.fingerprint import bits
from deltaw.heads import new_heads
from deltaw.train.escape import printable
from deltaw.train.recipe import Recipe

SAMPLE = "It's Tuesday, 17:05 - the Café costs $3.50; wasn't it UNAFFORDABLE?"


def base_digest(model: nn.Module) -> str:
    """Return a digest of name, shape and bits of every parameter but those of new heads."""
    heads = tuple(f"{path}." for path in new_heads(model))
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not name.startswith(heads):
            digest.update(f"{name} {tuple(parameter.shape)} {bits(parameter)}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, the special tokens and how one text is cut."""
    vocabulary = sorted((str(token), index) for token, index in tokenizer.get_vocab().items())
    seen = [vocabulary, sorted(tokenizer.all_special_tokens), tokenizer(SAMPLE)["input_ids"]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def find_base(recipe: Recipe, model: str | None) -> str:
    """Return `model`, or the base that the recipe names.

    Raises:
        RunError: if that is a folder which is not there.
    """
    if model is not None:
        return model
    if Path(recipe.model).is_absolute() and not Path(recipe.model).is_dir():
        raise RunError(
            f"The base model of this run is no longer at {printable(recipe.model, 300)}.\n"
            "Fix: say where it is now with --model."
        )
    return recipe.model


def require_base(model: nn.Module, source: str, recipe: Recipe) -> None:
    """Raise `RunError` if `model`, loaded from `source`, is not the base the recipe records."""
    recorded = (recipe.record or {}).get("base")
    if recorded is not None and recorded != base_digest(model):
        raise RunError(
            f"The weights of {printable(source, 300)} are not those that this run was trained on.\n"
            "Fix: name the original model with --model, or train again on this one."
        )


def require_tokenizer(tokenizer: Any, folder: Path, recipe: Recipe) -> None:
    """Raise `RunError` if `tokenizer`, loaded from `folder`, is not the one the recipe records."""
    recorded = (recipe.record or {}).get("tokenizer")
    if recorded is not None and recorded != tokenizer_digest(tokenizer):
        raise RunError(
            f"The tokenizer in {printable(str(folder), 300)} is not the one that this run was "
            "trained with: its files were lost or changed.\n"
            f"Fix: copy them again from the base model ({printable(recipe.model, 300)})."
        )
