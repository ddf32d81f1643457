"""From an adapted model to the state of one of its adapters."""

from torch import nn

from deltaw.errors import StateError
from deltaw.root import adapted_layers, find_root
from deltaw.snapshot import state_of
from deltaw.state import State


def capture(model: nn.Module, name: str = "default") -> State:
    """Return the adapter `name` of `model` as tensors and settings.

    The tensors are detached and share memory with the model's: copy them before training on.

    Raises:
        StateError: if the model has no such adapter.
    """
    root = find_root(model)
    configs = root.authority.configs if root is not None else {}
    if root is None or name not in configs:
        have = ", ".join(configs) or "none"
        raise StateError(f"There is no adapter {name!r} to capture. Adapters: {have}.")
    return state_of(root, adapted_layers(root), root.authority, name)
