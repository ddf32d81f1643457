"""The processes that train together, told by the variables of torchrun; without them one alone.

Every process prepares the same; what is written or decided by a file is done by the first.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from deltaw.errors import ConfigError
from deltaw.train.interrupt import Stopped

Found = TypeVar("Found")


def count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Tell whether this is the process that writes and prints."""
    return rank() == 0


def shared_out() -> bool:
    """Tell whether `accelerate launch` asks for FSDP, which is ours to do then.

    Raises:
        ConfigError: if it asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ConfigError(
            "DeepSpeed is not used here.\n"
            "Fix: accelerate launch --use_fsdp, which shares out what ZeRO-3 does."
        )
    return os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true"


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes while the block lasts; of errors in several the first one is raised.

    A process that is not the first to fail ends without a word.
    """
    if count() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()
    except BaseException as error:
        first = _first_to_fail()
        if not torch.cuda.is_available():  # under NCCL that would wait for the others
            dist.destroy_process_group()
        if not first:
            raise SystemExit(error.exit_code if isinstance(error, Stopped) else 1) from None
        raise
    dist.destroy_process_group()


def _first_to_fail() -> bool:
    """Tell whether no other process is known to have failed before."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed", 1) == 1)
    except (RuntimeError, ValueError):  # nobody is there to ask: better said twice than never
        return True


def from_first(make: Callable[[], Found]) -> Found:
    """Return in every process what `make` returns in the first, where alone it runs."""
    if count() == 1:
        return make()
    found = [make() if first() else None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]  # type: ignore[return-value]


def gathered(value: Found) -> list[Found]:
    """Return the values of all processes, in the order of their numbers."""
    if count() == 1:
        return [value]
    found: list[Found | None] = [None] * count()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def summed(value: float) -> float:
    """Return the sum of the numbers of all processes, in float64."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
