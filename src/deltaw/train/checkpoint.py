"""What a checkpoint holds, and reading it again, or one error that says how to go on without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from deltaw.errors import RunError, raise_all
from deltaw.train.distributed import sharding
from deltaw.train.escape import printable
from deltaw.train.randomness import file_name

TRAINED = "trained.safetensors"
STATE = "trainer_state.json"
FIX = (
    "delete this checkpoint and any newer one; the same command then goes on from the one before, "
    "or from the first step."
)


@contextmanager
def reading(checkpoint: Path | str | None) -> Iterator[None]:
    """Turn whatever is wrong with a checkpoint's files into one `RunError`; memory is not."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except PermissionError as error:
        raise RunError(
            f"{printable(str(checkpoint), 300)} cannot be read: {error.strerror}.\n"
            "Fix: check the permissions; nothing was changed."
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnpicklingError):  # torch's reason advises to run what is in it
            reason = "a pickle in it is cut, or would run code, which deltaw never does"
        raise RunError(
            f"{printable(str(checkpoint), 300)} is damaged: {printable(reason, 200)}\nFix: {FIX}"
        ) from error


def require_complete(checkpoint: Path) -> None:
    """Raise `RunError` with all files that going on exactly from `checkpoint` needs and lacks."""
    names = [TRAINED, STATE, OPTIMIZER_NAME, SCHEDULER_NAME, file_name(0)]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    raise_all(RunError, f"{printable(str(checkpoint), 300)} lacks files:", missing, FIX)


def read_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state; raise `RunError` if it cannot be read."""
    with reading(checkpoint):
        state: TrainerState = TrainerState.load_from_json(str(checkpoint / STATE))
    return state


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, on the CPU, in the dtype it is kept in."""
    return {name: t.detach().cpu().contiguous() for name, t in changing(model).items()}


def changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters and the buffers of adapters by name."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {name: b for name, b in model.named_buffers() if ".adapter." in name}


def restore(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's tensors into `model`, which is adapted as it was then.

    Raises:
        RunError: if its file cannot be read, or listing every tensor that is missing, unexpected
            or of another shape.
    """
    with reading(checkpoint):
        tensors = safetensors.torch.load_file(checkpoint / TRAINED)
    ours = changing(model)
    raise_all(
        RunError,
        f"{printable(str(checkpoint), 300)} does not fit the model:",
        [f"{name}: missing in the checkpoint" for name in sorted(ours.keys() - tensors)]
        + [f"{name}: not trained now" for name in sorted(tensors.keys() - ours)]
        + [
            f"{name}: {tuple(tensors[name].shape)} in the checkpoint, {tuple(t.shape)} in the model"
            for name, t in ours.items()
            if name in tensors and tensors[name].shape != t.shape
        ],
        "resume with the recipe of the run, or start over with --overwrite.",
    )
    with torch.no_grad():
        for name, tensor in ours.items():
            sharding.copy(tensors[name], tensor)
