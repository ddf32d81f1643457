"""What is compared in training: deltaw, its peers, all weights, and the frozen floor.

All adapt every linear layer but the head with r=16 and alpha=32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

RANK, ALPHA = 16, 32


def frozen(model: Any, *, loss: bool = False) -> Any:
    """Freeze the model; gradients still flow through it to the embedded tokens."""
    import deltaw

    model.requires_grad_(False)
    model.enable_input_require_grads()
    if loss:
        deltaw.fuse_loss(model)
    return model


def ours(
    model: Any,
    *,
    dropout: float = 0.0,
    dora: bool = False,
    loss: bool = False,
    blocks: bool = False,
    remake: bool = False,
) -> Any:
    """Attach an adapter of deltaw, and fuse what is asked for."""
    import deltaw

    config = deltaw.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=dora)
    deltaw.attach(model, config)
    if loss:
        deltaw.fuse_loss(model)
    if blocks:
        deltaw.fuse_blocks(model, remake=remake)
    return model


def peft_config(dropout: float = 0.0, dora: bool = False) -> Any:
    """Return the same settings for PEFT."""
    import peft

    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def by_peft(model: Any, *, dropout: float = 0.0, dora: bool = False, autocast: bool = True) -> Any:
    """Wrap the model by PEFT."""
    import peft

    config = peft_config(dropout, dora)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def by_loralib(model: Any) -> Any:
    """Replace the layers by loralib's, with the same weights."""
    import loralib
    from torch import nn

    head = model.get_output_embeddings()
    linear = [
        (p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    ]
    for path, old in linear:
        new = loralib.Linear(
            old.in_features,
            old.out_features,
            r=RANK,
            lora_alpha=ALPHA,
            merge_weights=False,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
        )
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(path, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


def full(model: Any) -> Any:
    """Train every weight."""
    return model


class Contestant(NamedTuple):
    """How one is called in tables, and what makes it of a model, in place."""

    title: str
    prepare: Callable[[Any], Any]


CONTESTANTS = {
    "floor": Contestant("frozen, no adapters", frozen),
    "floor-loss": Contestant("frozen, `fuse_loss`", partial(frozen, loss=True)),
    "deltaw": Contestant("deltaw", ours),
    "deltaw-blocks": Contestant("deltaw, `fuse_blocks`", partial(ours, blocks=True)),
    "deltaw-remake": Contestant(
        "deltaw, `fuse_blocks(remake=True)`", partial(ours, blocks=True, remake=True)
    ),
    "deltaw-loss": Contestant("deltaw, `fuse_loss`", partial(ours, loss=True)),
    "deltaw-lean": Contestant(
        "deltaw, `fuse_loss`, `fuse_blocks`", partial(ours, loss=True, blocks=True)
    ),
    "deltaw-dropout": Contestant("deltaw, dropout 0.1", partial(ours, dropout=0.1)),
    "deltaw-dora": Contestant("deltaw, DoRA", partial(ours, dora=True)),
    "peft": Contestant("PEFT", by_peft),
    "peft-bf16": Contestant(
        "PEFT, `autocast_adapter_dtype=False`", partial(by_peft, autocast=False)
    ),
    "peft-dropout": Contestant("PEFT, dropout 0.1", partial(by_peft, dropout=0.1)),
    "peft-dora": Contestant("PEFT, DoRA", partial(by_peft, dora=True)),
    "loralib": Contestant("loralib", by_loralib),
    "full": Contestant("all weights", full),
}
