"""The names of loralib on top of deltaw: `import deltaw.compat.loralib as lora`.

Layers are built by hand in the place of torch's. Each is the plain layer adapted by deltaw, so that
`eval()` and `train()` touch no weight: `merge_weights` is accepted and changes nothing. In a state
dict a layer keeps loralib's names: `<path>.weight`, `<path>.lora_A`, `<path>.lora_B`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.compat.loralib_layer import (
    FACTORS,
    NAME,
    Asked,
    LoRALayer,
    has_adapter,
    name_as_loralib,
)
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError
from deltaw.layers.conv1d import Conv1D
from deltaw.layers.conv_factored import factored_shape
from deltaw.root import adopt
from deltaw.state import LayerState, State
from deltaw.swap import swap


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
        self.asked = Asked(r, lora_alpha, merge_weights)
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
        self.asked = Asked(r, lora_alpha, merge_weights)
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
        self.asked = Asked(r, lora_alpha, merge_weights)
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
        self.asked = Asked(r, lora_alpha, merge_weights)
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
        else:
            name_as_loralib(self)


class Conv1d(_ConvNd, nn.Conv1d):
    """`nn.Conv1d` adapted as loralib factors it."""


class Conv2d(_ConvNd, nn.Conv2d):
    """`nn.Conv2d` adapted as loralib factors it."""


class Conv3d(_ConvNd, nn.Conv3d):
    """`nn.Conv3d` adapted as loralib factors it."""


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but A, B and, with `bias`, the biases of `"all"` modules or `"lora_only"`.

    Those of `"lora_only"` are the biases of loralib's layers, also of those with r=0.
    """
    _check_bias(bias)
    layers = _layers(model)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        parameter.requires_grad_(last in FACTORS or (bias == "all" and "bias" in last))
    for layer in layers.values():
        if bias == "lora_only" and layer._parameters.get("bias") is not None:
            layer.get_parameter("bias").requires_grad_(True)
    adapted = [layer for layer in layers.values() if has_adapter(layer)]
    for layer in adapted:
        layer.authority = adapted[0].authority
    if adapted:
        adopt(model, adapted[0].authority)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return A and B of all layers by loralib's names, and biases as for the training above.

    Those of layers with r=0 are among them, which loralib trains and does not save.
    """
    _check_bias(bias)
    wanted = set(FACTORS) | ({"bias"} if bias == "lora_only" else set())
    names = {f"{path}.{last}".removeprefix(".") for path in _layers(model) for last in wanted}
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
    deltaw.attach(nn.ModuleDict({"layer": layer}), source, NAME)
    if layer._parameters.get("bias") is not None:
        layer.get_parameter("bias").requires_grad_(True)
    name_as_loralib(layer)


def _config(r: int, alpha: float, dropout: float, enabled: Sequence[bool] = ()) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=["layer"],
        lora_dropout=dropout,
        modules_to_save=[],
        enable_lora={"layer": list(enabled)} if enabled else None,
    )


def _layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALayer)}


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias must be none, all or lora_only, not {bias!r}.")
