"""The device that a model is used on, where no Trainer places it."""

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
