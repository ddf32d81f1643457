"""A model whose weights, gradients and optimiser are shared out over the processes (FSDP2).

Source: torch.distributed.fsdp.fully_shard, for each of the model's blocks and for the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from deltaw.train.distributed import processes


class Sharded(nn.Module):
    """Calls a model that is shared out, in bfloat16 if asked; gradients can wait for later ones."""

    def __init__(self, model: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(kind, (processes.count(),))
        blocks = set(model._no_split_modules or ())  # type: ignore[arg-type]
        for part in model.modules():
            if type(part).__name__ in blocks:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        self.model = model
        self.call = model.__call__
        if bf16:
            self.call = convert_outputs_to_fp32(torch.autocast(kind, torch.bfloat16)(self.call))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model does."""
        return self.call(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of a part of a step in each process."""
        for part in _parts(self.model):
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in _parts(self.model):
                part.set_requires_gradient_sync(True, recurse=False)


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Hold every weight in full while the block lasts, to be read; called by all processes."""
    parts = _parts(model)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the state of a model that is `whole` now, or None for one that is not shared out.

    `state_dict` would give it back in shares.
    """
    if not _parts(model):
        return None
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def full(tensor: Any) -> Any:
    """Return a tensor that is shared out in full, anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy(value: Tensor, tensor: Tensor) -> None:
    """Write a full tensor into one that may be shared out."""
    tensor.copy_(_shared_as(value.to(tensor.device), tensor))


def _shared_as(value: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def keep_full(optimizer: Optimizer) -> None:
    """Have an optimiser write its state in full and read it so, whatever shares the weights."""
    optimizer.register_state_dict_post_hook(_in_full)
    optimizer.register_load_state_dict_pre_hook(_shared_out)


def _in_full(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    held = {
        index: {name: full(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": held}


def _shared_out(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    held = {
        index: {
            name: _shared_as(value.to(weights[index].device), weights[index])
            if value.shape == weights[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": held}
