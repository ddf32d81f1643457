"""Where a run's base model is, and whether it is the one that the run was trained on."""

import hashlib
from pathlib import Path

from torch import nn

from deltaw.errors import RunError
from deltaw.fingerprint import bits
from deltaw.heads import new_heads
from deltaw.train.escape import printable
from deltaw.train.recipe import Recipe


def base_digest(model: nn.Module) -> str:
    """Return a digest of name, shape and bits of every parameter but those of new heads."""
    heads = tuple(f"{path}." for path in new_heads(model))
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not name.startswith(heads):
            digest.update(f"{name} {tuple(parameter.shape)} {bits(parameter)}\n".encode())
    return digest.hexdigest()


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
