"""Recognising weights by some of their bits."""

import ctypes
import hashlib
from collections.abc import Mapping

from torch import Tensor

ROWS = 8
"""How many rows of each weight a mark looks at, or up to twice as many."""


def mark(weights: Mapping[str, Tensor]) -> str | None:
    """Return `dtype/rows:digest` over rows of these weights by name, None where there are none.

    Some rows of each weight are looked at, at equal distances: another base differs in all of them,
    and a model of any size takes milliseconds. The dtype of packed weights names their device too
    where that is not the CPU: its kernels may have rounded them otherwise, and only marks of the
    same dtypes are compared.
    """
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(raw(some_rows(weight)))
    kinds = ",".join(sorted(set(map(_kind, weights.values()))))
    return f"{kinds}/{ROWS} rows:{digest.hexdigest()}" if weights else None


def _kind(weight: Tensor) -> str:
    dtype, device = str(weight.dtype).removeprefix("torch."), weight.device.type
    packed = not weight.is_floating_point() and device != "cpu"
    return f"{dtype} on {device}" if packed else dtype


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's elements in order."""
    here = tensor.detach().cpu().contiguous()
    return ctypes.string_at(here.data_ptr(), here.nbytes)


def some_rows(weight: Tensor) -> Tensor:
    """Return rows at equal distances, from the first one on."""
    rows = len(weight) if weight.dim() else 0
    return weight.detach()[:: max(1, (rows - 1) // ROWS)] if rows > ROWS else weight
