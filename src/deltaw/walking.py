"""The modules of the base, at a cost that does not grow with the adapters on it."""

from collections.abc import Iterator

from torch import nn

from deltaw.layer import AdaptedLayer


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` does, in its order, without what adapters brought."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
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
