"""Packing fake weights in 4 bits, as `deltaw.quantize` packs real ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import TargetError
from deltaw.quant import _bnb
from deltaw.quant.bnb4 import Bnb4
from deltaw.quantizing import to_pack


@dataclass(frozen=True)
class Packing:
    """Which 4-bit values, whether their scales are packed too, and which modules are left out."""

    kind: str = "nf4"
    double: bool = True
    exclude_modules: Sequence[str] = ()


def template(packing: Packing) -> nn.Module:
    """Return a layer of bitsandbytes whose attributes a packed layer gets.

    Call it before there are fakes: what bitsandbytes makes once and keeps must be real.
    """
    _quantized(torch.zeros(64), packing)
    made: nn.Module = _bnb.library().nn.Linear4bit(
        2, 2, bias=False, quant_type=packing.kind, device="meta"
    )
    return made


def pack(model: nn.Module, like: nn.Module, packing: Packing) -> None:
    """Pack the linear layers of a model of fake tensors in place as `like`, but no heads.

    bitsandbytes' own class of packed weights takes no fake tensors, so a plain parameter holds what
    is packed; layer, state and products are bitsandbytes' own.

    Raises:
        TargetError: if there is nothing to pack.
    """
    layers = [layer for _, layer in to_pack(model, packing.exclude_modules)]
    if not layers:
        raise TargetError(f"{type(model).__name__} has no linear layer to pack in 4 bits")
    for layer in layers:
        _pack(layer, like, packing)


def _pack(layer: nn.Linear, like: nn.Module, packing: Packing) -> None:
    W = layer.weight.data
    data, state = _quantized(W, packing)
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    state.dtype = W.dtype
    _bnb.take(layer, like, Bnb4.brings, weight)
    vars(layer)["quant_state"], vars(layer)["compute_dtype"] = state, W.dtype
    Bnb4().settle(layer)


def _quantized(W: Tensor, packing: Packing) -> Any:
    return _bnb.library().functional.quantize_4bit(
        W, blocksize=64, compress_statistics=packing.double, quant_type=packing.kind
    )
