"""Recognising the base that an adapter was trained on by its bits."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from deltaw.geometry import WEIGHT
from deltaw.marks import mark, raw
from deltaw.offload import stored
from deltaw.state import LayerState
from deltaw.storage import inner
from deltaw.walking import walk

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> str:
    """Return a digest that changes when bits of `tensor` change or rows or columns change places.

    Contrived exchanges that leave all sums of rows and of columns as they are go unseen.

    The tensor is read as a matrix of integers, as wide as its rows allow, whose rows and columns
    are summed on its device at the speed of memory; only these sums go through SHA-256.
    """
    digest = hashlib.sha256()
    for part in inner(tensor):
        rows = len(part) if part.dim() else 1
        matrix = part.contiguous().view(-1).view(torch.uint8).reshape(rows, -1)
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        if matrix.numel():
            width = math.gcd(matrix.shape[1], 8)
            words = matrix.view(_INTEGER[width])
            for sums in (words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)):
                digest.update(raw(sums))
    return digest.hexdigest()


def adapted_weights(layers: Mapping[str, LayerState]) -> list[tuple[str, str]]:
    """Return path and name of every parameter that a state adapts by factors."""
    return [
        (path, name)
        for path, layer in layers.items()
        if layer.kind != "module"
        for name in (parameters_of(layer) if layer.kind == "experts" else [WEIGHT])
    ]


def parameters_of(layer: LayerState) -> list[str]:
    """Return the parameters adapted on their own."""
    return [key.removesuffix(".lora_A") for key in layer.tensors if key.endswith(".lora_A")]


def fingerprint(model: nn.Module, adapted: Iterable[tuple[str, str]]) -> str | None:
    """Return `dtype/rows:digest` over rows of frozen weights, given by path and name.

    None where there are no such weights, or they are on the meta device. A table with `max_norm` is
    left out: torch renormalises its rows whenever they are looked up.
    """
    weights: dict[str, Tensor] = {}
    modules = dict(walk(model))
    for path, name in sorted(adapted):
        module = modules[path]
        if getattr(module, "max_norm", None) is not None:
            continue
        own = _weights(module, name)
        if not own or any(weight.is_meta for weight in own.values()):
            return None
        for part, weight in own.items():
            weights[path if part == WEIGHT else f"{path}.{part}"] = inner(weight)[0]
    return mark(weights)


def _weights(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a parameter; of a module without a weight its matrices, children's included.

    Biases and what adapters brought are none.
    """
    if module._parameters.get(name) is not None:
        return {name: stored(module, name)}
    found = {}
    for path, parameter in module.named_parameters() if name == WEIGHT else ():
        inside, _, own = path.rpartition(".")
        if parameter.dim() > 1 and "adapter" not in inside.split("."):
            found[path] = stored(module.get_submodule(inside), own)
    return found
