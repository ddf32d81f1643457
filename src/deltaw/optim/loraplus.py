"""LoRA+: B learns λ times as fast as A, lr_B = λ lr_A.

Adam moves every entry by about its learning rate. In a wide layer A and B both learn features only
if lr_B / lr_A grows with the width; a fixed λ of 4 to 16 stands for that. `groups` is for whatever
builds its optimiser itself, `create_loraplus_optimizer` has PEFT's name and arguments.

Source: arXiv 2402.12354, sections 4 and 5. We differ from PEFT 0.21, which gives every vector the
rate of B: here B and the bias on B alone have it, and biases and heads that are trained in full, as
all that is no low-rank factor, keep the plain rate. No vector decays.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from deltaw.adapter import Adapter
from deltaw.errors import ConfigError, StateError, raise_all
from deltaw.layer import AdaptedLayer
from deltaw.optim import Group, decays, grouped

LR_EMBEDDING = 1e-6


def rates(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = LR_EMBEDDING,
) -> dict[nn.Parameter, float]:
    """Return the learning rate of each trainable parameter.

    Args:
        model: a model with adapters.
        lr: the rate of A, and of all that is no low-rank factor.
        loraplus_lr_ratio: λ; B and the bias on B have the rate λ lr.
        loraplus_lr_embedding: the rate of A and B on embeddings.

    Raises:
        ConfigError: listing every number that is not above 0.
        StateError: if no B is trained.
    """
    given = {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_lr_embedding": loraplus_lr_embedding,
    }
    raise_all(
        ConfigError,
        "LoRA+ cannot be used:",
        [
            f"{name} must be a number above 0, got {value!r}"
            for name, value in given.items()
            if not isinstance(value, (int, float)) or not 0 < value < math.inf
        ],
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast = {p for name, p in trained.items() if name.rpartition(".")[2].startswith("lora_B")}
    if not fast:
        raise StateError(
            f"No B of an adapter on {type(model).__name__} is trained, so LoRA+ would do nothing.\n"
            "Fix: call deltaw.attach first, or leave LoRA+ out."
        )
    found = {p: lr * loraplus_lr_ratio if p in fast else lr for p in trained.values()}
    return found | {p: loraplus_lr_embedding for p in _on_embeddings(model) if p in found}


def groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = LR_EMBEDDING,
    loraplus_weight_decay: float = 0.0,
) -> list[Group]:
    """Return parameter groups with `lr` and `weight_decay` for any optimiser.

    Matrices decay by `loraplus_weight_decay`, vectors do not. Raises what `rates` does.
    """
    found = rates(model, lr, loraplus_lr_ratio, loraplus_lr_embedding)
    return grouped(
        model,
        lambda name, p: {
            "lr": found[p],
            "weight_decay": loraplus_weight_decay if decays(name, p) else 0.0,
        },
    )


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = LR_EMBEDDING,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> Optimizer:
    """Return an `optimizer_cls` over `groups`; further `options`, such as `betas`, are its own.

    Raises:
        ConfigError: if it does not take these groups and options, or does not keep the rates; if
            `weight_decay` is given, which the groups would override.
        StateError: if no B is trained.
    """
    if options.get("weight_decay", loraplus_weight_decay) != loraplus_weight_decay:
        raise ConfigError(
            f"weight_decay={options['weight_decay']!r} would have no effect: every group of LoRA+ "
            "has its own.\nFix: give loraplus_weight_decay in its place."
        )
    found = groups(model, lr, loraplus_lr_ratio, loraplus_lr_embedding, loraplus_weight_decay)
    wanted = [group["lr"] for group in found]
    try:
        optimizer = optimizer_cls(found, lr=lr, **options)
        kept = [group["lr"] for group in optimizer.param_groups]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise _refused(optimizer_cls, str(error)) from error
    if kept != wanted:
        raise _refused(optimizer_cls, f"its groups have the rates {kept} instead of {wanted}")
    return optimizer


def _refused(optimizer_cls: Callable[..., Optimizer], reason: str) -> ConfigError:
    name = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
    return ConfigError(
        f"{name} cannot be built over parameter groups of several rates: {reason}\n"
        "Fix: use an optimiser that takes groups, such as torch.optim.AdamW, and its own options."
    )


def _on_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Return the tensors of the low-rank adapters on embeddings."""
    return [
        parameter
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer) and isinstance(layer, nn.Embedding)
        for part in layer.adapter.modules()
        if isinstance(part, Adapter) and not part.replaces
        for parameter in part.parameters()
    ]
