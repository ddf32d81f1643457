"""Packing fake weights in nf4, as `deltaw.quantize` packs real ones."""

from typing import Any

import torch
from torch import Tensor, nn

from deltaw.heads import new_heads, output_head
from deltaw.patterns import within
from deltaw.quant import _bnb
from deltaw.quant.bnb4 import Bnb4
from deltaw.walking import walk

KIND = "nf4"


def template() -> nn.Module:
    """Return a layer of bitsandbytes whose attributes a packed layer gets.

    Call it before there are fakes: what bitsandbytes makes once and keeps must be real.
    """
    _quantized(torch.zeros(64))
    made: nn.Module = _bnb.library().nn.Linear4bit(2, 2, bias=False, quant_type=KIND, device="meta")
    return made


def pack(model: nn.Module, like: nn.Module) -> None:
    """Pack the linear layers of a model of fake tensors in place as `like`, but no heads.

    bitsandbytes' own class of packed weights takes no fake tensors, so a plain parameter holds what
    is packed; layer, state and products are bitsandbytes' own.
    """
    kept = {*output_head(model), *new_heads(model)}
    for path, layer in walk(model):
        if type(layer) is nn.Linear and not within(path, kept):
            _pack(layer, like)


def _pack(layer: nn.Linear, like: nn.Module) -> None:
    W = layer.weight.data
    data, state = _quantized(W)
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    state.dtype = W.dtype
    _bnb.take(layer, like, Bnb4.brings, weight)
    vars(layer)["quant_state"], vars(layer)["compute_dtype"] = state, W.dtype
    Bnb4().settle(layer)


def _quantized(W: Tensor) -> Any:
    return _bnb.library().functional.quantize_4bit(
        W, blocksize=64, compress_statistics=True, quant_type=KIND
    )
