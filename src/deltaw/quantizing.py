"""Packing the linear layers of a model in place, and getting a packed model ready to train."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deltaw.bypassing import reader_of
from deltaw.errors import ConfigError, StateError, TargetError, raise_all
from deltaw.heads import new_heads, output_head
from deltaw.layer import AdaptedLayer
from deltaw.patterns import ends_with, within
from deltaw.quant import kinds, storage_of
from deltaw.recomputing import recompute
from deltaw.select import nearest
from deltaw.storage import Packer
from deltaw.swap import clear_bound_forward
from deltaw.walking import walk

FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""What reads the weights of its children past their forward."""
DTYPE_READER = re.compile(r"Dense(Gated)?ActDense$")
"""Names of transformers' classes, T5's and its kin's, that cast what goes into their child `wo` to
the dtype of its weight, which for a packed one is that of bytes."""
DOUBLE = ("nf4", "fp4")
"""The kinds of which the scales can be packed too."""


@torch.inference_mode(False)
def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    exclude_modules: Sequence[str] = (),
    double_quantization: bool | None = None,
    device: torch.device | str | None = None,
) -> tuple[str, ...]:
    """Pack the weights of the linear layers of `model` in place; return their paths.

    The layers stay what they are, with their names, biases and hooks. Left as they are: output
    heads and new heads, which lose most; subclasses of `nn.Linear`; what torch or transformers
    reads past its forward; what is packed already; and layers whose adapter has absorbed its start.
    Models that transformers quantises while it loads them need no such step.

    Args:
        model: the model, with its weights.
        kind: `"nf4"`, `"fp4"` or `"int8"` by bitsandbytes, `"torchao-int8"` or `"torchao-int4"`.
        exclude_modules: names of further modules to leave as they are, with all that is in them.
        double_quantization: whether the scales of nf4 and fp4 are packed too; None is yes.
        device: where each layer is packed and stays, one after another, so that a GPU needs room
            for what is packed and one full layer; None is where it is. It should be the device
            that the model will be used on.

    Raises:
        ConfigError: if there is no such kind, or its package is not installed.
        StateError: if adapters are on the model that need its weights as they are.
        TargetError: listing every name that matches nothing and every layer that cannot be packed;
            nothing is changed then.
    """
    storage = packer_of(kind, double_quantization)
    modules = dict(walk(model))
    raise_all(
        StateError,
        "Packing would change the weights under these adapted layers:",
        [
            path or type(m).__name__
            for path, m in modules.items()
            if isinstance(m, AdaptedLayer) and not m.authority.absorbed
        ],
        "quantize the model first and attach then, or deltaw.detach(model).",
    )
    misses = [n for n in exclude_modules if not any(ends_with(path, n) for path in modules)]
    problems = [f"exclude_modules {n!r} matches nothing{nearest(n, list(modules))}" for n in misses]
    layers = dict(to_pack(model, exclude_modules))
    for path, layer in layers.items():
        problems += [f"{path}: {why}" for why in misfits(layer, kind, device)]
    problems += _tied(modules, layers)
    fix = "leave such layers out with exclude_modules, or choose another kind."
    raise_all(TargetError, f"The model cannot be packed in {kind}:", problems, fix)
    rebinds = [clear_bound_forward(layer, path) for path, layer in layers.items()]
    for layer, rebind in zip(layers.values(), rebinds, strict=True):
        if device is not None:
            layer.to(device)
        storage.pack(layer, kind, double_quantization is not False)
        rebind()
    return tuple(layers)


def prepare_quantized(
    model: nn.Module, *, float32: bool = False, checkpointing: bool = False
) -> None:
    """Get a model with packed weights ready for training, in place.

    All parameters are frozen, and no forward pass changes the bits of a packed weight. `attach`
    does both; call this before a model that transformers quantised is first run without gradients.

    Args:
        model: a model without adapters.
        float32: keep what is not packed (norms, embeddings, heads) in float32.
        checkpointing: recompute activations in the backward pass; for models of transformers. The
            input embeddings then require gradients, so that reentrant checkpointing works too.

    Raises:
        ConfigError: if `checkpointing` is asked of another model.
        StateError: if no weight of the model is packed, or adapters are on it.
    """
    packed = [m for _, m in walk(model) if storage_of(m) is not None]
    adapted = any(isinstance(m, AdaptedLayer) for _, m in walk(model))
    if adapted or not packed:
        why = "it has adapters already" if adapted else "none of its weights is packed"
        raise StateError(
            f"{type(model).__name__} cannot be prepared for training: {why}.\n"
            "Fix: load it quantised or call deltaw.quantize, then this, then attach."
        )
    if checkpointing:
        _checkpoint(model)
    model.requires_grad_(False)
    for layer in packed:
        storage = storage_of(layer)
        assert storage is not None
        storage.settle(layer)
    if float32:
        for _, module in walk(model):
            if storage_of(module) is None:
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.is_floating_point():
                        parameter.data = parameter.data.float()


def packer_of(kind: str, double: bool | None = None) -> Packer:
    """Return the storage that packs in that kind.

    Raises:
        ConfigError: if there is none, or `double` quantisation has no meaning for it.
    """
    known = kinds()
    if kind not in known:
        raise ConfigError(
            f"There is no way called {kind!r} to pack a weight. Fix: use one of {', '.join(known)}."
        )
    if double is not None and kind not in DOUBLE:
        raise ConfigError(
            f"double_quantization={double} has no meaning for {kind}, only for "
            f"{' and '.join(DOUBLE)}. Fix: leave it out."
        )
    return known[kind]


def to_pack(model: nn.Module, exclude: Sequence[str] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that are packed."""
    modules = dict(walk(model))
    kept = {path for path in modules for name in exclude if path and ends_with(path, name)}
    kept |= {*output_head(model), *new_heads(model)}
    for path, layer in modules.items():
        parent, _, name = path.rpartition(".")
        inside = isinstance(modules.get(parent), FAST_PATH) or (
            name == "wo" and DTYPE_READER.search(type(modules[parent]).__name__) is not None
        )
        read = inside or reader_of(modules, path) is not None
        left = read or within(path, kept) or storage_of(layer) is not None
        if type(layer) is nn.Linear and not left:
            yield path, layer


def misfits(layer: nn.Linear, kind: str, device: torch.device | str | None = None) -> list[str]:
    """Return why the weight of a layer cannot be packed in that kind, there or where it is."""
    if layer.weight.is_meta:
        return ["its weight is on the meta device; load the weights first"]
    if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return [f"its weight is {layer.weight.dtype}, and only up to 32 bits can be packed"]
    where = layer.weight.device if device is None else torch.device(device)
    return kinds()[kind].misfits(layer, kind, where)


def _tied(modules: dict[str, nn.Module], layers: dict[str, nn.Linear]) -> list[str]:
    """Return the layers whose weight another module holds too."""
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    return [
        f"{path}: its weight is tied to {', '.join(p for p in shared if p != path)}"
        for path, layer in layers.items()
        if len(shared := holders[id(layer.weight)]) > 1
    ]


def _checkpoint(model: Any) -> None:
    known = sys.modules.get("transformers")
    if known is None or not isinstance(model, known.PreTrainedModel):
        raise ConfigError(
            f"checkpointing=True is for models of transformers, not for {type(model).__name__}.\n"
            "Fix: use torch.utils.checkpoint in its forward."
        )
    recompute(model)
    model.enable_input_require_grads()
