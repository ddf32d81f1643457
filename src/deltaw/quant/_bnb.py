"""What the storages of bitsandbytes share: importing it, and telling its layers."""

import functools
import logging
import sys
from typing import Any

import torch
from torch import nn

from deltaw.geometry import WEIGHT
from deltaw.quant._importing import imported


@functools.cache
def library() -> Any:
    """Return bitsandbytes; raise `ConfigError` if it is not installed."""
    found = imported("bitsandbytes", "bnb")
    # Every int8 layer says in every forward pass that it quantises from float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found


def is_any(layer: nn.Module, *names: str) -> bool:
    """Tell whether a layer is of one of these classes of `bitsandbytes.nn`, without importing it.

    A swapped class is one of its own class too.
    """
    known = sys.modules.get("bitsandbytes")
    return known is not None and isinstance(layer, tuple(getattr(known.nn, n) for n in names))


def refusals(layer: nn.Module) -> list[str]:
    """Return the reasons against any layer of bitsandbytes."""
    if isinstance(layer, nn.Linear):
        return []
    return ["only linear layers can be adapted where the weight is packed"]


def misfits(device: torch.device) -> list[str]:
    """Return the reasons against packing a weight there."""
    if device.type not in library().supported_torch_devices:
        return [f"bitsandbytes has no kernel for the device {device.type}"]
    return []


def take(layer: nn.Linear, made: nn.Module, brings: tuple[str, ...], weight: nn.Parameter) -> None:
    """Make `layer` a layer like `made`, with a packed weight."""
    layer.__class__ = type(made)  # type: ignore[assignment]
    for name in brings:
        setattr(layer, name, vars(made)[name])
    layer._load_state_dict_pre_hooks.update(made._load_state_dict_pre_hooks)
    layer._parameters[WEIGHT] = weight
