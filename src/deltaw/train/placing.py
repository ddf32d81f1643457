"""The device that a model is used on where no Trainer places it, and what is said of a full one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from deltaw.errors import RunError

Model = TypeVar("Model", bound=nn.Module)
SHARE = 0.9
"""How much of the GPU's free memory a model may take that is moved before it must be."""


def home() -> torch.device | None:
    """Return this process's GPU, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def has_room(model: nn.Module) -> bool:
    """Tell whether there is a GPU with room for the parameters that are still on the CPU."""
    if not torch.cuda.is_available():
        return False
    missing = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    return missing < SHARE * torch.cuda.mem_get_info()[0]


def place(model: Model) -> Model:
    """Return the model, moved to this process's GPU if there is one.

    Raises:
        RunError: if it does not fit there.
    """
    if not torch.cuda.is_available():
        return model
    with fitting(model):
        return model.cuda()


@contextmanager
def fitting(model: nn.Module) -> Iterator[None]:
    """Turn a GPU without memory left, for the model itself, into an error that says so."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{type(model).__name__} does not fit into the memory of the GPU.\n"
            "Fix: end what else uses the GPU, or set CUDA_VISIBLE_DEVICES='' to use the CPU."
        ) from error


@contextmanager
def memory_said() -> Iterator[None]:
    """Turn a GPU without memory left, in training, into an error that says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"The GPU has no memory left: {str(error).splitlines()[0]}\n"
            "Fix: a smaller batch_size with gradient_accumulation, gradient_checkpointing=true, or "
            "a shorter max_length; deltaw check says what each would take."
        ) from error
