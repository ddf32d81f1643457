"""Memory of this process, and the bytes that autograd keeps."""

import resource
from collections.abc import Callable
from typing import Any

PAGE = resource.getpagesize()


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def peak() -> int:
    """Return the most bytes of this process that were in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page_faults() -> int:
    """Return how often the kernel gave this process a page without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def saved_bytes(model: Any, forward: Callable[[], object]) -> int:
    """Return the bytes of all storages kept for the backward pass, those of the model aside.

    The tensors are held until all are counted, since the address of one that is gone is used again.
    """
    import torch

    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held}
    total = sum(
        tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own
    )
    del output
    return total
