"""What to say where a layer cannot be computed since its tensors do not go together."""

import torch
from torch import Tensor, nn

from deltaw.errors import StateError, raise_all

WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight")
"""What layers call the weight that their first input meets."""


def explain(layer: nn.Module, x: object, packed: bool) -> None:
    """Raise a StateError that lists what lies elsewhere than the input or has another dtype.

    Do nothing where all go together, so that the error at hand can be raised on. The dtype of a
    `packed` weight says nothing.
    """
    if not isinstance(x, Tensor):
        return
    own = {n: p for n, p in layer.named_parameters() if not p.is_meta}
    problems = [f"{n} lies on {p.device}" for n, p in own.items() if p.device != x.device]
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(
        x.device.type
    )
    if x.is_floating_point() and not packed and not autocast:
        found = [(name, own[name]) for name in WEIGHTS if name in own]
        problems += [f"{name} is {W.dtype}" for name, W in found if W.dtype != x.dtype]
    raise_all(
        StateError,
        f"{type(layer).__name__}({layer.extra_repr()}) cannot take its input, {x.dtype} on "
        f"{x.device}:",
        problems,
        "put model and input on one device and in one dtype; adapters go with their layer and "
        "compute in the dtype of its input.",
    )
