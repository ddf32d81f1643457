"""Adapters that a run begins with: the last one is trained on, those before it are merged.

What is merged is part of what is saved, so that every adapter of a run is one of the base that its
recipe names, and needs nothing else.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

import deltaw
from deltaw.combine import concatenate, highest_rank
from deltaw.config import LoraConfig
from deltaw.errors import FormatError, MergeError, RunError, raise_all
from deltaw.fingerprint import bits
from deltaw.formats import format_of, sniff
from deltaw.state import State
from deltaw.train.escape import printable
from deltaw.train.model import full_name
from deltaw.train.recipe import Recipe

ADAPTER = "default"


@dataclass(frozen=True)
class Adapted:
    """What is trained, in words, with warnings; the adapters that were merged before.

    `chosen` are keys of the recipe as the adapter that is trained on has them, `began` the digests
    of all that the run begins with.
    """

    said: str
    warnings: tuple[str, ...]
    merged: tuple[State, ...] = ()
    chosen: Mapping[str, list[str] | None] = field(default_factory=dict)
    began: Sequence[str] = ()


def require_adapters(recipe: Recipe) -> None:
    """Raise `RunError` listing every adapter of the recipe that is none."""
    problems = []
    for path in recipe.adapter or ():
        try:
            sniff(Path(path))
        except FormatError as error:
            problems.append(str(error).splitlines()[0].partition(" Fix: ")[0])
    raise_all(
        RunError,
        "The adapters that the run would begin with cannot be read:",
        problems,
        "adapter takes folders with adapter_config.json and adapter_model.safetensors, such as "
        "the run of an adapter.",
    )


def read_adapters(model: nn.Module, recipe: Recipe) -> list[State]:
    """Return the adapters of the recipe, each tried on `model`, which stays as it is.

    Raises:
        FormatError: if one is damaged, does not fit, or was trained on another base.
    """
    found = []
    for path in recipe.adapter or ():
        try:
            deltaw.load(model, path, ADAPTER)
        except FormatError as error:
            raise FormatError(f"adapter {printable(path, 300)}: {error}") from error
        found.append(deltaw.capture(model, ADAPTER))
        deltaw.detach(model)
    return found


def last_settings(recipe: Recipe) -> LoraConfig | None:
    """Return the settings of the recipe's last adapter, which no model is needed for.

    Raises:
        FormatError: if it is damaged.
    """
    if not recipe.adapter:
        return None
    path = Path(recipe.adapter[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are given when the model gets it
        return sniff(path).read(path, finite=False).config


def merge_adapters(model: nn.Module, states: Sequence[State]) -> None:
    """Add each adapter to the weights of `model` for good; raise `MergeError` if that cannot be."""
    for state in states:
        deltaw.attach(model, state, ADAPTER, trainable=False)
        deltaw.merge(model, original="none")
        deltaw.detach(model)


def go_on(model: nn.Module, recipe: Recipe, state: State) -> str:
    """Put the adapter on `model` to be trained on; return what it is, in words."""
    base = state.config.base_model_name_or_path or full_name(recipe.model)
    config = replace(state.config, base_model_name_or_path=base)
    deltaw.attach(model, replace(state, config=config), ADAPTER)
    kinds = Counter(layer.kind for layer in state.layers.values())
    parts = [
        f"{count} x {'trained in full' if kind == 'module' else kind}"
        for kind, count in kinds.items()
    ]
    assert recipe.adapter is not None
    return (
        f"{' and '.join(parts)} at r={highest_rank(state)}, going on from "
        f"{printable(recipe.adapter[-1], 200)}"
    )


def require_one(merged: Sequence[State], state: State) -> None:
    """Raise `RunError` if the run could not save its adapter with those merged before it."""
    try:
        as_one(merged, state)
    except MergeError as error:
        raise RunError(
            f"The adapters merged before this one cannot be saved with it as one:\n{error}\n"
            "Fix: write the model with them by deltaw export RUN OUT --to hf, and give OUT as "
            "model."
        ) from error


def as_one(merged: Sequence[State], state: State) -> State:
    """Return the sum of the adapters, as one of the base that none is merged into.

    Raises:
        MergeError: if they have no sum of that form.
    """
    if not merged:
        return state
    base = state.config.base_model_name_or_path
    named = [replace(s, config=replace(s.config, base_model_name_or_path=base)) for s in merged]
    on_merged = replace(state, base=None)  # whose fingerprint is that of the weights since then
    return concatenate([_on_cpu(each) for each in (*named, on_merged)])


def save(model: nn.Module, folder: Path, merged: Sequence[State]) -> None:
    """Write the adapter of `model`, with those merged before it, in PEFT's format."""
    if not merged:
        deltaw.save(model, folder, ADAPTER)
        return
    format_of("peft").write(as_one(merged, deltaw.capture(model, ADAPTER)), folder)


def digests(states: Sequence[State]) -> list[str]:
    """Return a digest of every tensor and scale of each adapter."""
    return [
        hashlib.sha256(
            "\n".join(
                f"{path} {name} {layer.scale} {sorted(layer.scales.items())} {bits(tensor)}"
                for path, layer in sorted(state.layers.items())
                for name, tensor in sorted(layer.tensors.items())
            ).encode()
        ).hexdigest()
        for state in states
    ]


def _on_cpu(state: State) -> State:
    layers = {
        path: replace(layer, tensors={name: t.cpu() for name, t in layer.tensors.items()})
        for path, layer in state.layers.items()
    }
    return replace(state, layers=layers)
