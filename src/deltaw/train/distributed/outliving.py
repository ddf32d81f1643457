"""Taking a process group down without waiting for oneself.

Where DDP's reducer drops the last reference to a group, the group goes while Python's lock is held:
it waits for gloo's threads, and one that has yet to drop a tensor of Python's waits for the lock.
The last reference of Python's own lets go of the lock first.
"""

import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def outlive(parallel: DistributedDataParallel) -> None:
    """Keep the group of a model until what DDP made of it in C++ is gone."""
    for part in (parallel.reducer, parallel.logger):
        weakref.finalize(part, _drop, parallel.process_group).atexit = False


def _drop(group: Any) -> None:
    """Let the last reference go with this call."""
