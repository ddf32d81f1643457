"""The device that a model is used on where no Trainer places it, and what is said of a full one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from deltaw.errors import RunError

Model = TypeVar("Model", bound=nn.Module)


def place(model: Model) -> Model:
    """Return the model, moved to this process's GPU if there is one.

    Raises:
        RunError: if it does not fit there.
    """
    if not torch.cuda.is_available():
        return model
    try:
        return model.cuda()
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
