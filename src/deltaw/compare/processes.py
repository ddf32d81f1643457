"""Work in processes of their own, a few at a time.

Without a GPU each starts with all libraries imported. What they import may initialise CUDA, which
no process survives that is forked then: with GPUs each starts anew, and sees one of them.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from deltaw.compare import worker
from deltaw.train.escape import printable
from deltaw.train.interrupt import Interrupt, Stopped

GRACE = 60.0
"""Seconds that a process has to write a checkpoint before it is killed."""
WAIT = 0.5
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Task:
    """A process at work."""

    name: str
    process: BaseProcess
    connection: Connection
    gpu: int | None = None

    def outcome(self) -> tuple[str, Any]:
        """Return what came of the work once it has ended: a kind, and its value or the reason."""
        try:
            found: tuple[str, Any] = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            killed = " (killed; perhaps for want of memory)" if code == -9 else ""
            return "refused", (
                f"the process of {printable(self.name, 200)} ended with code {code}{killed}.\n"
                "Fix: the same command goes on from there; with fewer --jobs each has more memory."
            )
        self.process.join()
        return found


class Pool:
    """Starts processes, on GPUs in turn where there are some; a signal stops them all."""

    def __init__(self, jobs: int, threads: int, interrupt: Interrupt) -> None:
        self.jobs = jobs
        self.threads = threads
        self.interrupt = interrupt
        self.tasks: list[Task] = []
        self.gpus = torch.cuda.device_count()
        self._context: BaseContext = multiprocessing.get_context("spawn")
        if not self.gpus:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([worker.__name__])

    @property
    def full(self) -> bool:
        """Whether no further task may be started now."""
        return len(self.tasks) >= self.jobs

    def start(self, name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Start `work` in a process of its own."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=worker.serve, args=(theirs, self.threads, work, *arguments), name=name
        )
        gpu = self._idlest()
        with _seeing(gpu):
            process.start()
        theirs.close()
        self.tasks.append(Task(name, process, ours, gpu))

    def _idlest(self) -> int | None:
        """Return the GPU with the fewest tasks, or None where there is none."""
        at_work = [task.gpu for task in self.tasks]
        return min(range(self.gpus), key=at_work.count, default=None)

    def ended(self) -> list[Task]:
        """Return the tasks that have ended, which leave the pool, or none after a little while.

        Raises:
            Stopped: when a signal came; every task has written a checkpoint then.
        """
        ready = wait([task.connection for task in self.tasks], WAIT)
        if self.interrupt.number is not None:
            self.stop()
            raise Stopped(
                self.interrupt.number, "Stopped; what is done is kept.\nThe same command goes on."
            )
        found = [task for task in self.tasks if task.connection in ready]
        self.tasks = [task for task in self.tasks if task not in found]
        return found

    def stop(self) -> None:
        """Let all tasks write a checkpoint and end."""
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            task.process.terminate()
        for task in tasks:
            task.process.join(GRACE)
            if task.process.is_alive():
                task.process.kill()
                task.process.join()


@contextmanager
def _seeing(gpu: int | None) -> Iterator[None]:
    """Let processes that start within the `with` block see that GPU alone."""
    if gpu is None:
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = str(gpu) if before is None else before.split(",")[gpu]
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before
