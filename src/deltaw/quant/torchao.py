"""torchao's weight-only storages: W = scale · (q - zero), in int8 by rows or int4 by groups of 64.

The layer stays an `nn.Linear` whose weight is a tensor of torchao's. int8 runs everywhere. int4
runs where torchao has a kernel, whose product passes no gradient: ours is dX = dY W. A CPU takes
float32, bfloat16 and float16 in the layout of `_weight_int4pack_mm_for_cpu`; a GPU takes bfloat16
in tiles.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import MergeError
from deltaw.geometry import WEIGHT
from deltaw.quant._importing import imported
from deltaw.storage import Packer
from deltaw.swap import origin_of

INT8, INT4 = "torchao-int8", "torchao-int4"
GROUP = 64
AMPERE = 8
"""The compute capability from which on a GPU has the int4 kernel."""


class TorchAO(Packer):
    """A tensor subclass of torchao as the weight."""

    kinds = (INT8, INT4)

    def fits(self, layer: nn.Module) -> bool:
        """Take any layer whose weight is of a class of torchao."""
        return type(layer._parameters.get(WEIGHT)).__module__.partition(".")[0] == "torchao"

    def read(self, layer: nn.Module) -> Tensor:
        """Return W in float32."""
        weight: Any = self.held(layer)
        if self.differentiable(layer):
            try:
                W: Tensor = weight.dequantize()
            except NotImplementedError:
                raise MergeError(
                    f"torchao cannot unpack a weight of {type(weight).__name__}.\n"
                    "Fix: load the adapter on the model as it was before it was packed."
                ) from None
            return W.float()
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return F.linear(identity, weight).T.float()

    def store(self, layer: nn.Module, W: Tensor) -> Mapping[str, Tensor]:
        """Pack W as `quantize` would."""
        weight = self.held(layer)
        kind = {"Int8Tensor": INT8, **dict.fromkeys(_INT4, INT4)}.get(type(weight).__name__)
        if kind is None or getattr(weight, "act_quant_kwargs", None) is not None:
            raise MergeError(
                f"a merged weight cannot be packed as a {type(weight).__name__} again; "
                "leave requantize out, which writes a dense one"
            )
        return {WEIGHT: _packed(W.to(weight.dtype), kind)}

    def plain(self, layer: nn.Module) -> type[nn.Module]:
        """Return the layer's own class, which takes a weight of any kind."""
        return origin_of(layer)

    def shape(self, layer: nn.Module) -> torch.Size:
        """Return (out, in)."""
        return self.held(layer).shape

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """Return what the weight was packed from."""
        return self.held(layer).dtype

    def differentiable(self, layer: nn.Module) -> bool:
        """Tell whether torchao's product is made of steps with gradients; those of int4 are not."""
        return not type(self.held(layer)).__name__.startswith("Int4")

    def refusals(self, layer: nn.Module) -> list[str]:
        """Refuse whatever is not linear."""
        if isinstance(layer, nn.Linear):
            return []
        return ["only linear layers can be adapted where the weight is packed"]

    def misfits(self, layer: nn.Linear, kind: str, device: torch.device) -> list[str]:
        """Refuse what torchao has no kernel for."""
        _library()
        if kind == INT8:
            return []
        out, into = layer.weight.shape
        reasons = [f"its input is no multiple of {GROUP}"] * (into % GROUP > 0)
        if device.type == "cpu":
            return reasons + ["its output is no multiple of 16"] * (out % 16 > 0)
        if device.type != "cuda":
            return [*reasons, f"torchao has no int4 kernel for the device {device.type}"]
        if layer.weight.dtype != torch.bfloat16:
            dtype = layer.weight.dtype
            reasons.append(f"it is in {dtype}, and the int4 kernel of a GPU takes bfloat16")
        if torch.cuda.get_device_capability(device)[0] < AMPERE:
            reasons.append("the int4 kernel takes a GPU of compute capability 8.0 or more")
        return reasons

    def pack(self, layer: nn.Linear, kind: str, double: bool) -> None:
        """Pack symmetrically by rows (int8), or with zero points in groups of 64 (int4)."""
        layer._parameters[WEIGHT] = _packed(layer.weight.data, kind)


_INT4 = ("Int4OpaqueTensor", "Int4TilePackedTo4dTensor")


def _library() -> Any:
    return imported("torchao.quantization", "torchao")


def _packed(W: Tensor, kind: str) -> nn.Parameter:
    known = _library()
    if kind == INT8:
        packed = known.Int8Tensor.from_hp(W, known.PerRow())
    elif W.device.type == "cpu":
        opaque = imported("torchao.prototype.quantization.int4.int4_opaque_tensor", "torchao")
        packed = opaque.Int4OpaqueTensor.from_hp(W, [1, GROUP])
    else:
        packed = known.Int4TilePackedTo4dTensor.from_hp(W, [1, GROUP])
    return nn.Parameter(packed, requires_grad=False)
