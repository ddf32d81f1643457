"""bitsandbytes' 8-bit weights: W = absmax / 127 · q, with one absmax for each row.

Source: LLM.int8(), arXiv 2208.07339, section 2.1. In evaluation, and on a GPU in training too,
bitsandbytes rounds the input to 8 bits as well, so the product is not W x to the last bits; its
gradient is that of W x. On a CPU training multiplies by the unpacked weight. Its scales, and a
second name of its bits, stay behind when the model is moved: here they follow the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.geometry import WEIGHT
from deltaw.quant import _bnb
from deltaw.storage import Packer


class Bnb8(Packer):
    """int8 with a float32 scale for each row, in the parameter or in the layer's `state`."""

    kinds = ("int8",)
    brings = ("state", "index")

    def fits(self, layer: nn.Module) -> bool:
        """Take the 8-bit layers of bitsandbytes."""
        return _bnb.is_any(layer, "Linear8bitLt", "Embedding8bit")

    def read(self, layer: nn.Module) -> Tensor:
        """Return W in float32."""
        weight: Any = self.held(layer)
        W: Tensor = weight.CB.float() * weight.SCB.unsqueeze(1).mul(1.0 / 127.0)
        return W

    def store(self, layer: nn.Module, W: Tensor) -> Mapping[str, Tensor]:
        """Pack W by rows."""
        return {WEIGHT: _packed(W)}

    def plain(self, layer: nn.Module) -> type[nn.Module]:
        """Return `nn.Linear`."""
        return nn.Linear

    def shape(self, layer: nn.Module) -> torch.Size:
        """Return (out, in)."""
        return super().held(layer).shape

    def dtype(self, layer: nn.Module) -> torch.dtype | None:
        """Return the dtype of the bias, as the weight does not tell."""
        bias = layer._parameters.get("bias")
        return None if bias is None else bias.dtype

    def refusals(self, layer: nn.Module) -> list[str]:
        """Refuse embeddings, and weights that are not packed, or anew in each pass."""
        reasons = _bnb.refusals(layer)
        if not reasons and super().held(layer).dtype != torch.int8:
            reasons.append("its weight is not packed in 8 bits (yet)")
        return reasons

    def held(self, layer: nn.Module) -> nn.Parameter:
        """Return the parameter with its scales, from where the next forward pass takes them."""
        _follow(layer)
        weight: Any = super().held(layer)
        if weight.CB is None:
            state: Any = layer.state
            weight.CB, weight.SCB = state.CB, state.SCB
        return weight  # type: ignore[no-any-return]

    def misfits(self, layer: nn.Linear, kind: str, device: torch.device) -> list[str]:
        """Refuse a device without kernels."""
        return _bnb.misfits(device)

    def pack(self, layer: nn.Linear, kind: str, double: bool) -> None:
        """Pack by rows."""
        W = layer.weight.data
        made = _bnb.library().nn.Linear8bitLt(
            *W.shape[::-1], bias=False, has_fp16_weights=False, device="meta"
        )
        _bnb.take(layer, made, self.brings, _packed(W))
        self.settle(layer)

    def settle(self, layer: nn.Module) -> None:
        """Keep all that makes up the weight on one device."""
        if _follow not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_follow)

    def unsettle(self, layer: nn.Module) -> None:
        """Take the hook off."""
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _follow]:
            del hooks[key]


def _follow(layer: nn.Module, *_: Any) -> None:
    """Bring what was left behind on another device to where the weight was moved."""
    weight: Any = layer._parameters[WEIGHT]
    state: Any = vars(layer).get("state")
    if state is None or weight.is_meta:
        return
    for held in (weight, state):
        if held.CB is not None and held.CB.device != weight.device:
            held.CB, held.SCB = weight.data, held.SCB.to(weight.device)


def _packed(W: Tensor) -> Any:
    known = _bnb.library()
    CB, SCB, _ = known.functional.int8_vectorwise_quant(W.to(torch.float16))
    return known.nn.Int8Params(CB, requires_grad=False, has_fp16_weights=False, CB=CB, SCB=SCB)
