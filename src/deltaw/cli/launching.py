"""Several processes that train together on this machine, started and ended by this one."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from deltaw.cli.reporting import reported
from deltaw.errors import ConfigError
from deltaw.train.interrupt import Interrupt

if TYPE_CHECKING:
    from deltaw.train.recipe import Recipe

GRACE = 20
"""Seconds in which the others end when one process failed."""
POLL = 0.5
LOCAL = "127.0.0.1"


def launched() -> bool:
    """Tell whether a launcher (torchrun, accelerate launch) has started this process."""
    return "WORLD_SIZE" in os.environ


def together(asked: int | None) -> int:
    """Return how many processes train together if their recipe lets them: as asked, or the GPUs."""
    if launched():
        return int(os.environ["WORLD_SIZE"])
    from torch import cuda

    return max(1, cuda.device_count()) if asked is None else asked


def wanted(asked: int | None, recipe: "Recipe") -> int:
    """Return how many processes to start: as asked, else one for each GPU that can have a share.

    It is one where a launcher has started this process.

    Raises:
        ConfigError: if there are fewer GPUs, or a launcher has decided.
    """
    if launched():
        if asked is not None:
            raise ConfigError(
                "--processes goes without a launcher: this process is one of "
                f"{os.environ['WORLD_SIZE']} by WORLD_SIZE.\nFix: leave --processes out."
            )
        return 1
    from torch import cuda

    visible = cuda.device_count()
    if asked is None:
        return _shared_by(recipe, visible) if visible > 1 else 1
    if 0 < visible < asked:
        raise ConfigError(
            f"--processes {asked} needs as many GPUs, and {visible} can be seen.\n"
            f"Fix: --processes {visible}, or look at CUDA_VISIBLE_DEVICES."
        )
    return asked


def _shared_by(recipe: "Recipe", visible: int) -> int:
    """Return how many of the GPUs can share the batches, and say so where it is not all."""
    from deltaw.language.choosing import settle
    from deltaw.train.distributed.shares import most

    count = most(settle(recipe), visible)
    if count < visible:
        print(f"processes {count} of {visible} GPUs can share the batches of this recipe")
    return count


def launch(count: int, target: Callable[..., object], options: Mapping[str, Any]) -> int:
    """Call `target(**options)` in so many processes that find each other; return the exit code.

    A signal is passed on to all; a second one ends them at once.
    """
    import torch.distributed as dist

    store = dist.TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=_work, args=(rank, count, store.port, target, options), daemon=True)
        for rank in range(count)
    ]
    with Interrupt() as interrupt:
        interrupt.waiting = True
        try:
            for process in processes:
                process.start()
            return _code(processes, interrupt)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _code(processes: Sequence[BaseProcess], interrupt: Interrupt) -> int:
    """Return the exit code of the first process that failed, or 0, when all have ended."""
    running = list(processes)
    passed_on = False
    code = 0
    while running:
        wait([process.sentinel for process in running], POLL if not code else GRACE)
        ended = [process for process in running if process.exitcode is not None]
        if code and not ended:
            return code
        running = [process for process in running if process not in ended]
        failed = [process.exitcode for process in ended if process.exitcode]
        if failed and not code:
            code = failed[0] if failed[0] > 0 else 128 - failed[0]
            if failed[0] < 0 and interrupt.number is None:
                _say_killed(-failed[0])
        if interrupt.number is not None and not passed_on:
            passed_on = True
            for process in running:
                assert process.pid is not None
                os.kill(process.pid, interrupt.number)
    return code


def _say_killed(number: int) -> None:
    """Say what a process that was ended from outside could not."""
    name = signal.Signals(number).name
    memory = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
    print(
        f"error: One of the processes was killed ({name}){memory}; the others were ended.\n"
        "Fix: the same command goes on from the last checkpoint; a smaller batch_size takes less.",
        file=sys.stderr,
    )


def _work(
    rank: int, count: int, port: int, target: Callable[..., object], options: Mapping[str, Any]
) -> None:
    """Do one process's part."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR=LOCAL,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    reported(lambda: target(**options))


def _end_with(sentinel: int) -> None:
    """Stop this process, with a checkpoint, when its parent is gone."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
