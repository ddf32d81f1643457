"""bitsandbytes' 4-bit weights: W = absmax · code[q] over blocks of 64, in nf4 or fp4.

With double quantisation the absmax of each block is kept in 8 bits over blocks of 256. Source:
QLoRA, arXiv 2305.14314, section 3 and equation 6. bitsandbytes computes the product and its
gradient; on a CPU it unpacks the weight for either. A CPU with bfloat16 instructions would repack
the weight in the first forward pass without gradients, rounding its scales, and pass no gradient
after that: adapted layers are kept from it.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.geometry import WEIGHT
from deltaw.quant import _bnb
from deltaw.storage import Packer


class Bnb4(Packer):
    """Two values in a byte, and the scales in the parameter's `quant_state`."""

    kinds = ("nf4", "fp4")
    brings = (
        "compute_dtype",
        "compute_type_is_set",
        "quant_state",
        "quant_storage",
        "support_avx512bf16_for_cpu",
    )

    def fits(self, layer: nn.Module) -> bool:
        """Take the 4-bit layers of bitsandbytes."""
        return _bnb.is_any(layer, "Linear4bit", "Embedding4bit")

    def read(self, layer: nn.Module) -> Tensor:
        """Return W in float32."""
        state = copy.copy(_state(layer))
        state.dtype = torch.float32
        W: Tensor = _bnb.library().functional.dequantize_4bit(self.held(layer).data, state)
        return W

    def store(self, layer: nn.Module, W: Tensor) -> Mapping[str, Tensor]:
        """Pack W as the weight in place is packed."""
        state, storage = _state(layer), self.held(layer).dtype
        return {WEIGHT: _packed(W, state.quant_type, state.nested, state.dtype, storage)}

    def plain(self, layer: nn.Module) -> type[nn.Module]:
        """Return `nn.Linear`."""
        return nn.Linear

    def shape(self, layer: nn.Module) -> torch.Size:
        """Return (out, in)."""
        shape: torch.Size = _state(layer).shape
        return shape

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """Return what the weight was packed from."""
        dtype: torch.dtype = _state(layer).dtype
        return dtype

    def refusals(self, layer: nn.Module) -> list[str]:
        """Refuse embeddings, weights that are not packed yet or are repacked for a CPU."""
        reasons = _bnb.refusals(layer)
        state = getattr(layer._parameters[WEIGHT], "quant_state", None)
        if not reasons and state is None:
            reasons.append("its weight is not packed yet; move the model to its device first")
        elif not reasons and getattr(state, "packing_format_for_cpu", False):
            reasons.append(
                "a forward pass without gradients repacked its weight, which rounded the scales "
                "and lets no gradient pass; load the model again and call "
                "deltaw.prepare_quantized(model) before it is run"
            )
        return reasons

    def settle(self, layer: nn.Module) -> None:
        """Keep bitsandbytes from repacking the weight in a forward pass."""
        vars(layer)["support_avx512bf16_for_cpu"] = False

    def misfits(self, layer: nn.Linear, kind: str, device: torch.device) -> list[str]:
        """Refuse an odd width, for which bitsandbytes compiles a routine of its own."""
        odd = layer.weight.shape[1] % 2 == 1
        return _bnb.misfits(device) + ["its input has an odd width"] * odd

    def pack(self, layer: nn.Linear, kind: str, double: bool) -> None:
        """Pack in blocks of 64; products are computed in the dtype that the weight had."""
        W = layer.weight.data
        made = _bnb.library().nn.Linear4bit(
            *W.shape[::-1], bias=False, compute_dtype=W.dtype, quant_type=kind, device="meta"
        )
        weight = _packed(W, kind, double, W.dtype, torch.uint8)
        _bnb.take(layer, made, self.brings, weight)
        vars(layer)["quant_state"] = weight.quant_state
        self.settle(layer)


def _state(layer: nn.Module) -> Any:
    return layer._parameters[WEIGHT].quant_state  # type: ignore[union-attr]


def _packed(W: Tensor, kind: str, double: bool, dtype: torch.dtype, storage: torch.dtype) -> Any:
    """Return W packed, as a parameter of a layer that computes in `dtype`."""
    weight = _bnb.library().nn.Params4bit(
        W, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    weight = weight.to(W.device)
    weight.quant_state.dtype = dtype
    return weight
