"""Is a base model the one that a run was trained on?"""

import hashlib

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


def require_base(model: nn.Module, source: str, recipe: Recipe) -> None:
    """Raise `RunError` if `model`, loaded from `source`, is not the base the recipe records."""
    recorded = (recipe.record or {}).get("base")
    if recorded is not None and recorded != base_digest(model):
        raise RunError(
            f"The weights of {printable(source, 300)} are not those that this run was trained on.\n"
            "Fix: name the original model with --model, or train again on this one."
        )
