"""Recognising the base that an adapter was trained on by its bits."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltaw.layer import WEIGHT
from deltaw.offload import stored

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> str:
    """Return a digest that changes when bits of `tensor` change or change places.

    Each row of the tensor, seen as a matrix, is hashed and each column summed on its device, both
    at the speed of memory; only these numbers go through SHA-256.
    """
    integers = tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])
    matrix = integers.reshape(len(integers), -1) if integers.dim() > 1 else integers.reshape(-1, 1)
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    if matrix.numel():
        rows = torch.hash_tensor(matrix, dim=1).view(torch.int64)
        columns = matrix.sum(dim=0, dtype=torch.int32)
        for numbers in (rows, columns):
            digest.update(bytes(numbers.view(torch.uint8).tolist()))
    return digest.hexdigest()


def fingerprint(model: nn.Module, paths: Iterable[str]) -> str | None:
    """Return `dtype:digest` over the frozen weights of the modules at `paths`, in one pass.

    None where there are no such weights, or they are on the meta device. A table with `max_norm`
    is left out: torch renormalises its rows whenever they are looked up.
    """
    weights: dict[str, Tensor] = {}
    for path in sorted(paths):
        module = model.get_submodule(path)
        if getattr(module, "max_norm", None) is not None:
            continue
        weight = None if module._parameters.get(WEIGHT) is None else stored(module, WEIGHT)
        if weight is None or weight.is_meta:
            return None
        weights[path] = weight
    digest = hashlib.sha256()
    for path, frozen in weights.items():
        digest.update(f"{path} {tuple(frozen.shape)} {bits(frozen)}\n".encode())
    dtypes = ",".join(sorted({str(weight.dtype) for weight in weights.values()}))
    return f"{dtypes.replace('torch.', '')}:{digest.hexdigest()}" if weights else None
