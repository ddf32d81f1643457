"""Noticing an optimiser that was built before `attach` and would train nothing."""

import functools
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from deltaw.errors import StateError

_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def watch(parameter: nn.Parameter) -> None:
    """Remember a parameter that `attach` froze, and check every optimiser from now on."""
    _frozen[parameter] = True
    _install()


def trains_nothing(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether all parameters of an optimiser are frozen, by `attach` at least one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return not any(p.requires_grad for p in parameters) and any(p in _frozen for p in parameters)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if trains_nothing(optimizer):
        raise StateError(
            "This optimiser was built before attach: all its parameters are frozen, so it would "
            "train nothing.\nFix: build it after deltaw.attach from the parameters that require "
            "gradients."
        )
