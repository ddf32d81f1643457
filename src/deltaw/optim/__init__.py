"""How it moves: one file per rule, as parameter groups for any optimiser, or as an optimiser."""

from collections.abc import Callable
from typing import Any

from torch import nn

Group = dict[str, Any]
"""One entry of an optimiser's `param_groups`: `params`, and the options that hold for them."""


def grouped(model: nn.Module, options: Callable[[str, nn.Parameter], Group]) -> list[Group]:
    """Return what is trained of `model`, parameters with equal options in one group."""
    held: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            held.setdefault(tuple(options(name, parameter).items()), []).append(parameter)
    return [{"params": parameters, **dict(key)} for key, parameters in held.items()]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay acts: on a matrix, not on a vector, nor on biases in a stack."""
    return parameter.ndim > 1 and "bias" not in name
