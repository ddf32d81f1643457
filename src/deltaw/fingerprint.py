"""Recognising the base that an adapter was trained on by its bits."""

import ctypes
import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from deltaw.geometry import WEIGHT
from deltaw.offload import stored
from deltaw.state import LayerState
from deltaw.storage import inner

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

ROWS = 8
"""How many rows of each weight its fingerprint looks at, or up to twice as many."""


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


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's elements in order."""
    here = tensor.detach().cpu().contiguous()
    return ctypes.string_at(here.data_ptr(), here.nbytes)


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

    Some rows of each weight are looked at, at equal distances: another base differs in all of them,
    and a model of any size takes milliseconds. None where there are no such weights, or they are on
    the meta device. A table with `max_norm` is left out: torch
    renormalises its rows whenever they are looked up.
    """
    weights: dict[str, Tensor] = {}
    for path, name in sorted(adapted):
        module = model.get_submodule(path)
        if getattr(module, "max_norm", None) is not None:
            continue
        own = _weights(module, name)
        if not own or any(weight.is_meta for weight in own.values()):
            return None
        for part, weight in own.items():
            weights[path if part == WEIGHT else f"{path}.{part}"] = inner(weight)[0]
    digest = hashlib.sha256()
    for path, frozen in weights.items():
        digest.update(f"{path} {tuple(frozen.shape)}\n".encode())
        digest.update(raw(_some_rows(frozen)))
    dtypes = ",".join(sorted({str(weight.dtype) for weight in weights.values()}))
    return f"{dtypes.replace('torch.', '')}/{ROWS} rows:{digest.hexdigest()}" if weights else None


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


def _some_rows(weight: Tensor) -> Tensor:
    """Return rows at equal distances, from the first one on."""
    rows = len(weight) if weight.dim() else 0
    return weight.detach()[:: max(1, (rows - 1) // ROWS)] if rows > ROWS else weight
