"""The modules of the base, at a cost that does not grow with the adapters on it."""

from collections.abc import Iterator

from torch import nn

from deltaw.layer import AdaptedLayer

WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What torch calls the one child of a module that is compiled or checkpointed."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a module wraps to compile or checkpoint it, or the module itself."""
    while len(module._modules) == 1 and (inside := WRAPPED & module._modules.keys()):
        module = module.get_submodule(*inside)
    return module


def bare(name: str) -> str:
    """Return the name of a module or tensor as it is without such wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` does, in its order, without what adapters brought.

    A module that is compiled or checkpointed comes in place of its wrapper, under the same name.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        module = unwrapped(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None and not (name == "adapter" and isinstance(module, AdaptedLayer))
        ]
        waiting += reversed(children)
