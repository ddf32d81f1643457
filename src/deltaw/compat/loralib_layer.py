"""What every layer of loralib has beside the layer it adapts: its factors, settings and names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from deltaw.adapters.lora import LoraAdapter
from deltaw.layer import AdaptedLayer

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

NAME = "default"
FACTORS = ("lora_A", "lora_B")


class Asked(NamedTuple):
    """What a layer was built with."""

    r: int
    lora_alpha: float
    merge_weights: bool


class LoRALayer(_Module):
    """Mixin of loralib's layers: A and B of the adapter, and what the layer was built with."""

    applies_weight = True
    asked: Asked

    @property
    def lora_A(self) -> Tensor:
        """Return A; that of fused slices is stacked, and writing into it writes into them."""
        return _factor(self, "lora_A")

    @property
    def lora_B(self) -> Tensor:
        """Return B; that of fused slices is stacked, and writing into it writes into them."""
        return _factor(self, "lora_B")

    @property
    def r(self) -> int:
        """Return the rank the layer was built with, 0 for none."""
        return self.asked.r

    @property
    def lora_alpha(self) -> float:
        """Return the numerator of the scale the layer was built with."""
        return self.asked.lora_alpha

    @property
    def merge_weights(self) -> bool:
        """Return what was asked for; `eval()` merges nothing either way."""
        return self.asked.merge_weights

    @property
    def scaling(self) -> float:
        """Return what B A is multiplied by."""
        return _parts(self, "scaling")[0].scale

    @property
    def merged(self) -> bool:
        """Tell whether `deltaw.merge` has written the adapter into the weight."""
        return has_adapter(self) and self.authority.merged is not None

    def lora_dropout(self, x: Tensor) -> Tensor:
        """Apply the adapter's dropout to its input."""
        part = _parts(self, "lora_dropout")[0]
        return nn.functional.dropout(x, part.dropout, part.training)

    def reset_parameters(self) -> None:
        """Draw the weight anew, and A and B as loralib does, with B A = 0."""
        if has_adapter(self):
            self.authority.require_unmerged("reset a layer")
            self.authority.fingerprints.clear()
        super().reset_parameters()  # type: ignore[operator]
        if has_adapter(self):
            if isinstance(self, nn.Embedding):
                nn.init.zeros_(self.lora_A)
                nn.init.normal_(self.lora_B)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
                nn.init.zeros_(self.lora_B)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FACTORS:
            super().__setattr__(name, value)
            return
        parts = _parts(self, name)
        if len(parts) > 1:
            places = ", ".join(_keys(cast(AdaptedLayer, self), "layer.", name))
            raise AttributeError(
                f"{name} is that of {len(parts)} slices and cannot be replaced as one.\n"
                f"Fix: copy into it with layer.{name}.data.copy_(...), or replace those of the "
                f"slices: {places}."
            )
        setattr(parts[0], name, value)


class _Stacked(torch.autograd.Function):
    """The slices of one factor above each other, in the memory of the slices themselves."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, *slices: Tensor) -> Tensor:
        ctx.count = len(slices)
        return stack.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *gradient.chunk(ctx.count)


def has_adapter(layer: nn.Module) -> TypeGuard[AdaptedLayer]:
    """Tell whether loralib's adapter is on the layer still; the hooks stay when it is detached."""
    return isinstance(layer, AdaptedLayer) and NAME in layer.adapter


def name_as_loralib(layer: nn.Module) -> None:
    """Give the state of an adapted layer loralib's names."""
    layer.register_state_dict_post_hook(_to_loralib)
    layer.register_load_state_dict_pre_hook(_from_loralib)


def _parts(layer: LoRALayer, name: str) -> list[LoraAdapter]:
    if not has_adapter(layer):
        raise AttributeError(f"{type(layer).__name__} with r=0 or detached has no {name}")
    return cast(list[LoraAdapter], list(layer.parts(NAME).values()))


def _factor(layer: LoRALayer, name: str) -> Tensor:
    slices = [part.get_parameter(name) for part in _parts(layer, name)]
    if len(slices) == 1:
        return slices[0]
    stacked: Tensor = _Stacked.apply(_in_one_memory(slices), *slices)
    return stacked


@torch.inference_mode(False)
@torch.no_grad()
def _in_one_memory(slices: Sequence[nn.Parameter]) -> Tensor:
    """Return the one tensor that holds the slices of a factor, moving them there if need be."""
    first = slices[0]
    places = [(each.untyped_storage().data_ptr(), each.storage_offset()) for each in slices]
    memory, start = places[0]
    if places == [(memory, start + index * first.numel()) for index in range(len(slices))]:
        rows, columns = first.shape
        return first.detach().as_strided((rows * len(slices), columns), (columns, 1))
    stack = torch.cat([each.detach() for each in slices])
    for each, part in zip(slices, stack.chunk(len(slices)), strict=True):
        each.data = part
    return stack


def _keys(layer: AdaptedLayer, prefix: str, name: str) -> list[str]:
    return [f"{prefix}adapter.{NAME}.{slot}.{name}" for slot in layer.parts(NAME)]


def _to_loralib(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    if not has_adapter(layer):
        return
    for name in FACTORS:
        parts = [state.pop(key) for key in _keys(layer, prefix, name)]
        state[prefix + name] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _from_loralib(layer: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    for name in FACTORS:
        if has_adapter(layer) and prefix + name in state:
            keys = _keys(layer, prefix, name)
            parts = state.pop(prefix + name).chunk(len(keys))
            state |= dict(zip(keys, parts, strict=False))
    # loralib keeps the layer that a convolution adapts one level below.
    for name in ("weight", "bias"):
        if isinstance(layer, nn.modules.conv._ConvNd) and f"{prefix}conv.{name}" in state:
            state[prefix + name] = state.pop(f"{prefix}conv.{name}")
