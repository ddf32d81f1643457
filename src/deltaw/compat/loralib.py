"""The names of loralib on top of deltaw: `import deltaw.compat.loralib as lora`.

Layers are built by hand in the place of torch's. Each is the plain layer adapted by deltaw, so that
`eval()` and `train()` touch no weight: `merge_weights` is accepted and changes nothing. In a state
dict a layer keeps loralib's names: `<path>.weight`, `<path>.lora_A`, `<path>.lora_B`.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError
from deltaw.layer import AdaptedLayer
from deltaw.layers.conv1d import Conv1D
from deltaw.layers.conv_factored import factored_shape
from deltaw.root import adopt
from deltaw.state import LayerState, State
from deltaw.swap import swap

_NAME = "default"
_FACTORS = ("lora_A", "lora_B")


class LoRALayer:
    """What every layer of loralib has beside the layer it adapts."""

    applies_weight = True

    @property
    def lora_A(self) -> Tensor:
        """Return A; that of fused slices is stacked."""
        return _factor(self, "lora_A")

    @property
    def lora_B(self) -> Tensor:
        """Return B; that of fused slices is stacked."""
        return _factor(self, "lora_B")


class Linear(LoRALayer, nn.Linear):
    """`nn.Linear` with W' = W + (lora_alpha / r) B A; `fan_in_fan_out` keeps W as (in, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.fan_in_fan_out = fan_in_fan_out
        _adapt_linear(self, r, lora_alpha, lora_dropout, [])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the frozen weight, however it is kept."""
        return F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)


class MergedLinear(Linear):
    """A fused linear layer of which the slices marked in `enable_lora` are adapted."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **options: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **options)
        self.fan_in_fan_out = fan_in_fan_out
        self.enable_lora = list(enable_lora)
        _adapt_linear(self, r if any(enable_lora) else 0, lora_alpha, lora_dropout, enable_lora)


class Embedding(LoRALayer, nn.Embedding):
    """`nn.Embedding` with W' = W + (lora_alpha / r) (B A)ᵀ."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        if r:
            _adapt(self, _config(r, lora_alpha, 0.0))


class _ConvNd(LoRALayer):
    """A convolution with W' = W + (lora_alpha / r) (B A) in the shape of W.

    A is (r k, in k) and B (k out/groups, r k) for a square kernel of side k; in one and three
    dimensions the powers of k are those that fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        if r:
            rows, columns = factored_shape(self)
            A = torch.empty(r * kernel_size, columns)
            nn.init.kaiming_uniform_(A, a=5**0.5)
            factors = {
                "weight.lora_A": A,
                "weight.lora_B": torch.zeros(rows, r * kernel_size),
            }
            like = LayerState("conv", factors, lora_alpha / r, groups=self.groups, factored=True)
            _adapt(self, State(_config(r, lora_alpha, lora_dropout), {"layer": like}))


class Conv1d(_ConvNd, nn.Conv1d):
    """`nn.Conv1d` adapted as loralib factors it."""


class Conv2d(_ConvNd, nn.Conv2d):
    """`nn.Conv2d` adapted as loralib factors it."""


class Conv3d(_ConvNd, nn.Conv3d):
    """`nn.Conv3d` adapted as loralib factors it."""


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but A, B and, with `bias`, the biases of `"all"` modules or `"lora_only"`."""
    _check_bias(bias)
    layers = _adapted(model)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        parameter.requires_grad_(last in _FACTORS or (bias == "all" and "bias" in last))
    for layer in layers.values():
        if bias == "lora_only" and layer._parameters.get("bias") is not None:
            layer.get_parameter("bias").requires_grad_(True)
    if layers:
        authority = next(iter(layers.values())).authority
        for layer in layers.values():
            layer.authority = authority
        adopt(model, authority)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return A and B of all layers by loralib's names, and biases as for the training above."""
    _check_bias(bias)
    wanted = set(_FACTORS) | ({"bias"} if bias == "lora_only" else set())
    names = {f"{path}.{last}".removeprefix(".") for path in _adapted(model) for last in wanted}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in names or (bias == "all" and "bias" in name.rpartition(".")[2])
    }


def _adapt_linear(
    layer: Linear, r: int, alpha: float, dropout: float, enabled: Sequence[bool]
) -> None:
    if r:
        _adapt(layer, _config(r, alpha, dropout, enabled))
    if layer.fan_in_fan_out:
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=not r)
        if r:
            swap(layer, Conv1D)


def _adapt(layer: nn.Module, source: LoraConfig | State) -> None:
    """Adapt one layer in place, its bias staying trainable, and give its state loralib's names."""
    deltaw.attach(nn.ModuleDict({"layer": layer}), source, _NAME)
    if layer._parameters.get("bias") is not None:
        layer.get_parameter("bias").requires_grad_(True)
    layer.register_state_dict_post_hook(_to_loralib)
    layer.register_load_state_dict_pre_hook(_from_loralib)


def _config(r: int, alpha: float, dropout: float, enabled: Sequence[bool] = ()) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=["layer"],
        lora_dropout=dropout,
        modules_to_save=[],
        enable_lora={"layer": list(enabled)} if enabled else None,
    )


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoRALayer) and _has_adapter(layer)
    }


def _factor(layer: LoRALayer, name: str) -> Tensor:
    if not _has_adapter(layer):
        raise AttributeError(f"{type(layer).__name__} with r=0 or detached has no {name}")
    parts = [part.get_parameter(name) for part in layer.parts(_NAME).values()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_adapter(layer: nn.Module) -> TypeGuard[AdaptedLayer]:
    """Tell whether loralib's adapter is on the layer still; the hooks stay when it is detached."""
    return isinstance(layer, AdaptedLayer) and _NAME in layer.adapter


def _keys(layer: AdaptedLayer, prefix: str, name: str) -> list[str]:
    return [f"{prefix}adapter.{_NAME}.{slot}.{name}" for slot in layer.parts(_NAME)]


def _to_loralib(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    if not _has_adapter(layer):
        return
    for name in _FACTORS:
        parts = [state.pop(key) for key in _keys(layer, prefix, name)]
        state[prefix + name] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _from_loralib(layer: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    for name in _FACTORS:
        if _has_adapter(layer) and prefix + name in state:
            keys = _keys(layer, prefix, name)
            parts = state.pop(prefix + name).chunk(len(keys))
            state |= dict(zip(keys, parts, strict=False))
    # loralib keeps the layer that a convolution adapts one level below.
    for name in ("weight", "bias"):
        if isinstance(layer, _ConvNd) and f"{prefix}conv.{name}" in state:
            state[prefix + name] = state.pop(f"{prefix}conv.{name}")


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias must be none, all or lora_only, not {bias!r}.")
