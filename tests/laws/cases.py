"""A small model for every layer geometry: odd shapes, and the oracle of its layer."""

import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import deltaw.layers
from deltaw.quant import kinds
from laws import oracle

Delta = Callable[[nn.Module, oracle.Tensors, float], Tensor | oracle.Tensors]
Apply = Callable[..., Tensor]
Call = Callable[[nn.Module, Tensor], Tensor]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    """How a layer of one input is called."""
    return layer(x)


def with_itself(layer: nn.Module, x: Tensor) -> Tensor:
    """How an attention is called whose queries, keys and values are the same."""
    return layer(x, x, x)[0]


def across(layer: nn.Module, x: Tensor) -> Tensor:
    """How an attention is called on three inputs, here of other widths."""
    return layer(x, *others(layer, x), need_weights=False)[0]


def others(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of those widths."""
    return x[..., : layer.kdim].flip(1), x[..., -layer.vdim :].sin()


@dataclass(frozen=True)
class Case:
    """One layer: the file of `deltaw/layers` it is for, how to build it, its input and its oracle.

    `form` says how an adapter gets on it: by a config, by one that names its parameter, or by the
    state of a file of PEFT's ("spanning") or loralib's ("factored") convolutions, or as a copy in
    full ("module"). `packed` is what its weight is packed in, which goes up to float32, and `slack`
    how far its own product is from that of the unpacked weight.
    """

    name: str
    file: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    delta: Delta
    apply: Apply
    enabled: tuple[bool, ...] = ()
    form: str = "config"
    mergeable: bool = True
    vocabulary: int = 0
    packed: str = ""
    slack: float = 0.0
    call: Call = plainly

    @property
    def absent(self) -> str:
        """The package that is not installed and without which nothing can be packed in this way."""
        name = "torchao" if self.packed.startswith("torchao") else "bitsandbytes"
        return "" if not self.packed or importlib.util.find_spec(name) else name

    @property
    def reloads(self) -> bool:
        """Whether the base loads its own `state_dict`, which bitsandbytes' layers do not."""
        return not self.packed or self.packed.startswith("torchao")

    def biases(self) -> list[str]:
        """The names of the layer's biases."""
        return [name for name, _ in self.layer().named_parameters() if "bias" in name]

    def x(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """An input; of an embedding every token."""
        dtype = torch.float32 if self.packed and dtype is torch.float64 else dtype
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randperm(self.vocabulary, generator=generator).view(self.shape)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def deltas(self, layer: nn.Module, tensors: oracle.Tensors, scale: float) -> oracle.Tensors:
        """ΔW of every weight by its name, less that of the start where it is subtracted."""
        own = {name: t for name, t in tensors.items() if ".start_" not in name}
        start = {n.replace("start", "lora"): t for n, t in tensors.items() if ".start_" in n}
        found = self._named(layer, own, scale)
        less = self._named(layer, start, scale) if start else {}
        return {name: delta - less.get(name, 0) for name, delta in found.items()}

    def learned(self, layer: nn.Module, tensors: oracle.Tensors, scale: float) -> Tensor:
        """The same of a layer's one weight."""
        return self.deltas(layer, tensors, scale)["weight"]

    def _named(self, layer: nn.Module, tensors: oracle.Tensors, scale: float) -> oracle.Tensors:
        found = self.delta(layer, tensors, scale)
        return {"weight": found} if isinstance(found, Tensor) else found

    def __str__(self) -> str:
        return self.name


class Scaled(nn.Embedding):
    """An embedding multiplied by a number, as those of several transformers models."""

    def __init__(self, *size: int, padding_idx: int | None = None) -> None:
        super().__init__(*size, padding_idx=padding_idx)
        self.embed_scale = 2.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class TensorScaled(nn.Embedding):
    """The same with the number in a buffer, as Gemma's."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.register_buffer("embed_scale", torch.tensor(1.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Named(nn.Linear):
    """A subclass, which stays one."""


class Mixture(nn.Module):
    """Three experts stacked in one parameter; position t goes to expert t mod 3."""

    experts = 3

    def __init__(self, stored: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(stored) * 0.4)
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, self.experts, x.shape[-1])
        parts = [nn.functional.linear(groups[:, e], self.weight[e]) for e in range(self.experts)]
        return torch.stack(parts, 1).view(*x.shape[:-1], -1) + self.bias


class Transposed(Mixture):
    """The same stored as (experts, in, out), in one batched product."""

    is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, self.experts, x.shape[-1]).transpose(0, 1)
        y = torch.bmm(groups, self.weight).transpose(0, 1)
        return y.reshape(*x.shape[:-1], -1) + self.bias


class Gathered(Mixture):
    """The same with one matrix taken for every position."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        place = torch.arange(len(tokens), device=x.device) % self.experts
        y = torch.bmm(self.weight[place], tokens.unsqueeze(-1)).squeeze(-1)
        return y.view(*x.shape[:-1], -1) + self.bias


class Matrix(Mixture):
    """One matrix that a module applies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class Shift(nn.Module):
    """A module that nobody targets, with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Head(nn.Module):
    """A classifier with statistics in buffers: the mean over positions, linear, BatchNorm."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.dense = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, y: Tensor) -> Tensor:
        features = y.movedim(self.axis, -1).flatten(1, -2).mean(1)
        return self.norm(self.dense(features))


class Small(nn.Module):
    """The layer, a shift, and where asked a head."""

    def __init__(
        self, layer: nn.Module, head: nn.Module | None = None, call: Call = plainly
    ) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.shift = Shift()
        self.head = head if head is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shift(self.call(self.layer, x)))


class Stack(nn.Module):
    """Several geometries in a row: (batch, time) tokens to (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.up = nn.Linear(6, 10)
        self.fused = sliced(nn.Linear(10, 9), 3)
        self.mixing = nn.Conv1d(9, 6, 3, padding=1, groups=3)
        self.gpt2 = Conv1D(5, 6)
        self.head = Head(5, -1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fused(torch.tanh(self.up(self.embed(x)))))
        return self.head(self.gpt2(self.mixing(h.mT).mT.contiguous()))


def sliced(layer: nn.Module, slices: int) -> nn.Module:
    """A fused layer; the number of its slices is for the oracle alone."""
    layer.slices = slices
    return layer


def _linear(name: str, layer: Callable[[], nn.Module]) -> Case:
    return Case(name, "linear", layer, (2, 3, 5), oracle.linear_delta, oracle.linear)


def _fused(name: str, *enabled: bool) -> Case:
    n = len(enabled)
    return Case(
        name,
        "linear",
        lambda: sliced(nn.Linear(5, 3 * n), n),
        (2, 3, 5),
        oracle.fused_delta,
        oracle.linear,
        enabled,
    )


def _packed(kind: str, slack: float = 0.0) -> Case:
    return Case(
        f"linear-{kind}",
        "linear",
        lambda: nn.Linear(64, 16),
        (2, 3, 64),
        oracle.linear_delta,
        oracle.linear,
        packed=kind,
        slack=slack,
    )


def _fused_gpt2(name: str, *enabled: bool) -> Case:
    n = len(enabled)
    return Case(
        name,
        "conv1d",
        lambda: sliced(Conv1D(3 * n, 5), n),
        (2, 3, 5),
        oracle.fused_delta,
        oracle.transposed,
        enabled,
    )


def _embedding(name: str, layer: Callable[[], nn.Module], mergeable: bool = True) -> Case:
    return Case(
        name,
        "embedding",
        layer,
        (3, 5),
        oracle.embedding_delta,
        oracle.embedding,
        mergeable=mergeable,
        vocabulary=15,
    )


def _conv(name: str, layer: Callable[[], nn.Module], *space: int) -> Case:
    shape = (2, layer().in_channels, *space)
    return Case(name, "conv", layer, shape, oracle.conv_delta, oracle.convolution)


def _spanning(name: str, layer: Callable[[], nn.Module], *space: int) -> Case:
    shape = (2, layer().in_channels, *space)
    return Case(
        name,
        "conv_spanning",
        layer,
        shape,
        oracle.spanning_delta,
        oracle.full_convolution,
        form="spanning",
        mergeable=False,
    )


def _factored(name: str, layer: Callable[[], nn.Module], *space: int) -> Case:
    shape = (2, layer().in_channels, *space)
    return Case(
        name,
        "conv_factored",
        layer,
        shape,
        oracle.factored_delta,
        oracle.convolution,
        form="factored",
    )


def _experts(name: str, layer: Callable[[], nn.Module]) -> Case:
    shape = (2, 3, 5)
    return Case(
        name, "experts", layer, shape, oracle.experts_delta, oracle.experts, form="parameter"
    )


def _transposed(name: str, layer: Callable[[], nn.Module], *space: int) -> Case:
    shape = (2, layer().in_channels, *space)
    return Case(
        name,
        "conv_transpose",
        layer,
        shape,
        oracle.transposed_conv_delta,
        oracle.transposed_convolution,
    )


def _attention(name: str, call: Call, enabled: tuple[bool, ...] = (), **options: object) -> Case:
    """Of three heads of width 2; torch's fast path takes an even number."""
    return Case(
        name,
        "attention",
        lambda: nn.MultiheadAttention(6, 3, **options),
        (2, 4, 6),
        oracle.attention_delta,
        oracle.attention,
        enabled,
        call=call,
    )


# LLM.int8() rounds the input to 8 bits, and int4 on a CPU sums in another order in half precision.
SLACK = {"int8": 3e-2}

CASES = (
    _linear("linear", lambda: nn.Linear(5, 7)),
    _linear("linear-without-bias", lambda: Named(5, 7, bias=False)),
    Case(
        "gpt2",
        "conv1d",
        lambda: Conv1D(7, 5),
        (2, 3, 5),
        oracle.transposed_delta,
        oracle.transposed,
    ),
    _fused("fused-101", True, False, True),
    _fused("fused-01", False, True),
    _fused("fused-1110", True, True, True, False),
    _fused_gpt2("gpt2-fused-101", True, False, True),
    _fused_gpt2("gpt2-fused-010", False, True, False),
    _embedding("embedding", lambda: nn.Embedding(15, 7)),
    _embedding("embedding-padding", lambda: nn.Embedding(15, 7, padding_idx=-2)),
    _embedding("embedding-scaled", lambda: Scaled(15, 7, padding_idx=4)),
    _embedding("embedding-tensor-scaled", lambda: TensorScaled(15, 7)),
    _embedding("embedding-max-norm", lambda: nn.Embedding(15, 7, max_norm=1.0), mergeable=False),
    _conv("conv1d", lambda: nn.Conv1d(4, 5, 3), 7),
    _conv("conv1d-stride-dilation", lambda: nn.Conv1d(3, 5, 3, 2, 2, dilation=2, bias=False), 9),
    _conv("conv1d-same", lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), 7),
    _conv(
        "conv1d-circular-groups",
        lambda: nn.Conv1d(4, 6, 3, padding=2, groups=2, padding_mode="circular"),
        5,
    ),
    _conv("conv2d", lambda: nn.Conv2d(3, 5, (3, 2), (1, 2), (1, 0)), 5, 7),
    _conv(
        "conv2d-reflect-dilation",
        lambda: nn.Conv2d(3, 5, 2, padding=(2, 1), dilation=(1, 2), padding_mode="reflect"),
        4,
        5,
    ),
    _conv("conv2d-groups", lambda: nn.Conv2d(4, 6, (1, 3), groups=2, dilation=(1, 2)), 3, 7),
    _conv(
        "conv2d-depthwise",
        lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, padding_mode="replicate"),
        4,
        5,
    ),
    _conv("conv3d", lambda: nn.Conv3d(2, 3, (2, 1, 3), (1, 2, 1), (1, 0, 2)), 3, 4, 3),
    _conv("conv3d-groups", lambda: nn.Conv3d(4, 2, 2, groups=2, dilation=(1, 2, 1)), 3, 4, 3),
    _spanning("spanning-conv1d", lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), 7),
    _spanning(
        "spanning-conv2d",
        lambda: nn.Conv2d(
            6, 3, (2, 3), padding=1, dilation=(1, 2), groups=3, padding_mode="circular"
        ),
        4,
        5,
    ),
    _spanning("spanning-conv3d", lambda: nn.Conv3d(4, 4, (1, 2, 2), groups=4, padding=1), 2, 3, 3),
    _factored("factored-conv1d", lambda: nn.Conv1d(3, 5, 3, padding=1), 6),
    _factored("factored-conv2d", lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), 5, 6),
    _factored("factored-conv3d", lambda: nn.Conv3d(2, 3, 2, dilation=2), 4, 3, 5),
    _experts("experts", lambda: Mixture((3, 7, 5), 7)),
    _experts("experts-transposed", lambda: Transposed((3, 5, 7), 7)),
    _experts("experts-gathered", lambda: Gathered((3, 7, 5), 7)),
    _experts("experts-matrix", lambda: Matrix((7, 5), 7)),
    _transposed("transposed1d", lambda: nn.ConvTranspose1d(4, 5, 3, 2, 1, output_padding=1), 5),
    _transposed(
        "transposed2d-groups",
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), groups=2, dilation=(1, 2), bias=False),
        3,
        4,
    ),
    _transposed("transposed3d", lambda: nn.ConvTranspose3d(2, 3, 2, (1, 2, 1), (1, 0, 0)), 3, 2, 3),
    _attention("attention", with_itself, batch_first=True),
    _attention("attention-1011", with_itself, (True, False, True, True)),
    _attention("attention-1000", with_itself, (True, False, False, False), bias=False),
    _attention("attention-widths", across, kdim=4, vdim=5, batch_first=True, add_bias_kv=True),
    _attention("attention-across", across, (False, True, False, True), add_zero_attn=True),
    Case(
        "layer-norm",
        "module",
        lambda: nn.LayerNorm(5),
        (2, 3, 5),
        lambda layer, tensors, scale: torch.zeros(5, dtype=torch.float64),
        lambda layer, x, W, b: (
            (x - x.mean(-1, keepdim=True))
            / (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
            * W
            + b
        ),
        form="module",
    ),
    *(_packed(kind, SLACK.get(kind, 0.0)) for kind in kinds()),
    replace(
        _fused("fused-101-nf4", True, False, True),
        packed="nf4",
        shape=(2, 3, 6),
        layer=lambda: sliced(nn.Linear(6, 9), 3),
    ),
)
BY_NAME = {case.name: case for case in CASES}
FILES = {file.name for file in pkgutil.iter_modules(deltaw.layers.__path__)}
