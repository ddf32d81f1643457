"""Layer-wise learning rates: lr decay^(L - l), smaller the nearer a block lies to the input.

The last of L blocks has l = L - 1, embeddings lie below the first, and all that comes after the
blocks has l = L. `decay` of 1 gives every layer the same rate.

Source: ULMFiT, arXiv 1801.06146, section 3.2.
"""

from torch import nn

from deltaw.errors import ConfigError, TargetError
from deltaw.optim import Group, decays, grouped


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, first to last: the longest list of modules in the base.

    Raises:
        TargetError: if there is none.
    """
    base = getattr(model, "base_model", model)
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise TargetError(
            f"{type(model).__name__} has no list of layers to count.\n"
            "Fix: train all of it at one rate, or adapt it, instead of counting its layers."
        )
    return max((list(found) for found in lists), key=len)


def factors(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return `decay^(L - l)` for each trainable parameter.

    Raises:
        ConfigError: if `decay` does not lie in (0, 1].
        TargetError: if the model has no list of blocks.
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"The decay from layer to layer must lie in (0, 1], got {decay!r}.")
    layers = blocks(model)
    steps = {p: len(layers) - i for i, layer in enumerate(layers) for p in layer.parameters()}
    below = {p: len(layers) + 1 for name, p in model.named_parameters() if _is_embedding(name)}
    return {
        p: decay ** steps.get(p, below.get(p, 0)) for p in model.parameters() if p.requires_grad
    }


def groups(model: nn.Module, lr: float, decay: float, weight_decay: float = 0.0) -> list[Group]:
    """Return parameter groups with `lr` and `weight_decay` for any optimiser; vectors do not decay.

    Raises what `factors` does.
    """
    found = factors(model, decay)
    return grouped(
        model,
        lambda name, p: {
            "lr": lr * found[p],
            "weight_decay": weight_decay if decays(name, p) else 0.0,
        },
    )


def _is_embedding(name: str) -> bool:
    return "embed" in name.lower() or ".wte." in name or ".wpe." in name
