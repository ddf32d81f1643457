"""Tables of embeddings of which some rows are trained: which those are, and who shares them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from deltaw.adapters.token_rows import TokenRowsAdapter
from deltaw.authority import Active
from deltaw.errors import TargetError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.patterns import within
from deltaw.select import Selection

Owner = tuple[int, str]
"""A module by its identity, and the name it has a parameter under."""


def tables_of(
    modules: Mapping[str, nn.Module], selection: Selection
) -> Mapping[str, Sequence[int]]:
    """Return path -> tokens of the embeddings that `trainable_token_indices` takes.

    Raises:
        TargetError: listing every module and every number that cannot be taken.
    """
    problems = []
    for path, ids in selection.tokens.items():
        reasons = refusals(modules[path], ids)
        owners = [path, *(followers(modules, path) if not reasons else ())]
        for owner in owners:
            if within(owner, selection.heads):
                reasons.append(f"{owner} is trained in full, its tokens too")
            elif owner in selection.targets:
                reasons.append(f"{owner} is adapted by factors, and its table read through these")
        problems += [f"{path}: {reason}" for reason in reasons]
    raise_all(
        TargetError,
        "trainable_token_indices cannot be used so:",
        problems,
        "give numbers of tokens that an embedding has, and leave it out of target_modules and "
        "modules_to_save.",
    )
    return selection.tokens


def refusals(module: nn.Module, ids: Sequence[int]) -> list[str]:
    """Return why the rows of these tokens cannot be trained in a module."""
    table = module._parameters.get(WEIGHT)
    if not isinstance(module, nn.Embedding) or table is None or not table.is_floating_point():
        return [f"{type(module).__name__} is no embedding with a plain table"]
    reasons = []
    if module.max_norm is not None:
        reasons.append("max_norm renormalises the rows it reads, and would not those")
    beyond = [str(number) for number in ids if not 0 <= number < len(table)]
    if beyond:
        reasons.append(f"it has tokens 0 to {len(table) - 1}, and no {', '.join(beyond[:5])}")
    if len(set(ids)) < len(ids):
        reasons.append("a token is named twice")
    return reasons if ids else ["no token is named"]


def width(module: nn.Module) -> int:
    """Return how many numbers a row of the module's table has."""
    table = module._parameters[WEIGHT]
    assert table is not None
    return table.shape[1]


def followers(modules: Mapping[str, nn.Module], path: str, name: str = WEIGHT) -> list[str]:
    """Return the paths of the other modules that hold the same parameter."""
    table = modules[path]._parameters[name]
    return [p for p, m in modules.items() if p != path and m._parameters.get(name) is table]


def changing_apart(
    shared: Mapping[Owner, list[str]], layers: Mapping[str, AdaptedLayer], active: Active
) -> dict[Owner, list[str]]:
    """Return the shared parameters but the tables whose owners all have the same rows replaced."""
    rows = {(id(m), WEIGHT): found for m in layers.values() if (found := _rows(m, active))}
    owners = Counter(rows.values())
    return {
        owner: others
        for owner, others in shared.items()
        if owner not in rows or owners[rows[owner]] != len(others) + 1
    }


def _rows(layer: AdaptedLayer, active: Active) -> tuple[int, ...]:
    """Return by identity the table of a layer and the rows in force; nothing if more changes it."""
    parts = [
        part
        for key, _ in active
        for slot, part in layer.parts(key).items()
        if (slot if part.replaces else layer.holder(slot)) == WEIGHT
    ]
    rows = [id(p.trainable_tokens_delta) for p in parts if isinstance(p, TokenRowsAdapter)]
    return (id(layer.frozen(WEIGHT)), *rows) if rows and len(rows) == len(parts) else ()
