"""Which parameters of a model share memory, as an embedding and its output head may."""

from torch import nn

from deltaw.offload import is_sharded
from deltaw.storage import inner
from deltaw.tables import Owner

Shared = dict[Owner, list[str]]
"""By the id of the module and the name of a parameter, the paths of those that share its memory."""


def shared_memory(model: nn.Module, root: nn.Module) -> Shared:
    """Return for parameters that share memory, within `root` or around it, the names of others."""
    inside = next(path for path, module in model.named_modules() if module is root)
    spans = sorted(
        (
            memory.data_ptr(),
            memory.data_ptr() + max(memory.nbytes, 1),
            f"{path}.{name}".removeprefix(f"{inside}.").lstrip("."),
            (id(module), name),
        )
        for path, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None and not p.is_meta and not is_sharded(p)
        for memory in inner(p)[:1]
    )
    groups: list[dict[tuple[int, str], str]] = []
    end = 0
    for first, last, shown, key in spans:
        if first >= end:
            groups.append({})
        groups[-1][key] = shown
        end = max(end, last)
    return {
        key: [shown for other, shown in group.items() if other != key]
        for group in groups
        if len(group) > 1
        for key in group
    }
