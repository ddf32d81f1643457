"""Recognising the base that an adapter was trained on by its bits."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltaw.layer import WEIGHT

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> int:
    """Return a 64-bit number that changes when bits of `tensor` change."""
    flat = tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])
    return int(torch.hash_tensor(flat).view(torch.int64)) ^ int(flat.sum(dtype=torch.int64))


def fingerprint(model: nn.Module, paths: Iterable[str]) -> str | None:
    """Return `dtype:digest` over the frozen weights of the modules at `paths`, in one pass.

    None where there are no such weights, or they are on the meta device.
    """
    weights: dict[str, Tensor] = {}
    for path in sorted(paths):
        weight = model.get_submodule(path)._parameters.get(WEIGHT)
        if weight is None or weight.is_meta:
            return None
        weights[path] = weight
    digest = hashlib.sha256()
    for path, frozen in weights.items():
        digest.update(f"{path} {tuple(frozen.shape)} {bits(frozen)}\n".encode())
    dtypes = ",".join(sorted({str(weight.dtype) for weight in weights.values()}))
    return f"{dtypes.replace('torch.', '')}:{digest.hexdigest()}" if weights else None
