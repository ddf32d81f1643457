"""A dense weight in place of a packed one while an adapter is merged, and the packed one again."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, MergeError
from deltaw.fingerprint import bits
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.quant import storage_of
from deltaw.storage import Original, Packed, inner
from deltaw.swap import swapped_class
from deltaw.walking import walk

MARKS = (
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
"""What transformers sets on a model that it packed."""


class Unpacked(NamedTuple):
    """What a merge makes of packed weights: packed ones again, or dense ones of some dtype."""

    requantize: bool
    dtype: torch.dtype | None
    usual: torch.dtype

    def require_effect(self, packed: bool) -> None:
        """Raise where the choice contradicts itself, or holds for no layer.

        Raises:
            ConfigError: if packed weights are to have a dtype.
            MergeError: if a choice is made and none of the merged layers is `packed`.
        """
        if self.requantize and self.dtype is not None:
            raise ConfigError(
                "requantize=True packs the merged weights, which have no dtype then.\n"
                "Fix: leave requantize or dtype out."
            )
        chosen = "requantize=True" if self.requantize else f"dtype={self.dtype}"
        if not packed and (self.requantize or self.dtype is not None):
            raise MergeError(
                f"{chosen} has no effect: none of the layers that are merged is packed, and a "
                "dense weight keeps its dtype.\nFix: leave it out, or cast the model (model.to)."
            )

    def refusals(self, original: str, layers: Mapping[str, AdaptedLayer]) -> list[str]:
        """Return the packed layers whose originals cannot be kept where they should."""
        if original in ("keep", "none"):
            return []
        return [
            f'{path}: a packed weight is kept where it is; use original="keep" or "none"'
            for path, layer in layers.items()
            if layer.storage is not None
        ]

    def dtype_of(self, layer: AdaptedLayer) -> torch.dtype | None:
        """Return the dtype of the merged weight; None where it is packed from the exact sum."""
        assert layer.storage is not None
        if self.requantize or layer.storage.plain(layer) is None:
            return None
        return self.dtype or layer.storage.dtype(layer) or self.usual

    def stored(self, layer: AdaptedLayer, W: Tensor) -> Mapping[str, Tensor]:
        """Return what holds the merged W; a parameter takes the place of the packed one."""
        assert layer.storage is not None
        if self.dtype_of(layer) is None:
            return layer.storage.store(layer, W)
        return {WEIGHT: DenseWeight(W, requires_grad=False)}


def usual_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first dense weight of the base, such as its embeddings."""
    found = (
        p.dtype
        for _, module in walk(model)
        for p in module._parameters.values()
        if p is not None and p.is_floating_point() and storage_of(module) is None
    )
    return next(found, torch.float32)


def beside(layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the bias, if it cannot be added to the product of a weight in `dtype` as it is."""
    bias = layer._parameters.get("bias")
    return {} if bias is None or bias.dtype == dtype else {"bias": bias}


class DenseWeight(nn.Parameter):
    """A dense weight that takes the place of a packed one."""


def replace_packed(layer: AdaptedLayer, new: nn.Parameter) -> None:
    """Put a parameter in the place of a packed weight, and keep the old one in `originals`."""
    storage = layer.storage
    assert storage is not None
    old = storage.held(layer)
    packed = None
    if isinstance(new, DenseWeight):
        plain = storage.plain(layer)
        assert plain is not None
        own = vars(layer)
        storage.unsettle(layer)
        attributes = {name: own.pop(name) for name in storage.brings if name in own}
        packed = Packed(storage, type(layer).origin, attributes)
        _become(layer, plain)
        layer.storage = None
        new = nn.Parameter(new.data, requires_grad=False)
    layer._parameters[WEIGHT] = new
    layer.originals[WEIGHT] = Original(inner(old)[0], bits(new), old, packed)


def forget_packing(model: nn.Module) -> None:
    """Take off the marks by which transformers saves models as packed, where they no longer are."""
    for _, module in walk(model):
        own = vars(module)
        if "hf_quantizer" in own and not any(storage_of(part) for _, part in walk(module)):
            for mark in MARKS:
                own.pop(mark, None)
            vars(own["config"]).pop("quantization_config", None)


def pack_again(layer: AdaptedLayer, packed: Packed) -> None:
    """Make `layer` what it was before its weight was unpacked; the weight itself comes after."""
    vars(layer).update(packed.attributes)
    layer.storage = packed.storage
    _become(layer, packed.origin)
    packed.storage.settle(layer)


def _become(layer: AdaptedLayer, origin: type[nn.Module]) -> None:
    """Give an adapted layer another class of its own under the adapters."""
    kind = type(layer)
    layer.__class__ = swapped_class(kind.mixin, origin, kind.overridden)  # type: ignore[assignment]
