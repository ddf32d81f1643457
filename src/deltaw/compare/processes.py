"""Work in processes of their own, a few at a time; each starts with all libraries imported."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from deltaw.compare import worker
from deltaw.train.escape import printable
from deltaw.train.interrupt import Interrupt, Stopped

GRACE = 60.0
"""Seconds that a process has to write a checkpoint before it is killed."""
WAIT = 0.5


@dataclass
class Task:
    """A process at work."""

    name: str
    process: BaseProcess
    connection: Connection

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
    """Starts processes from one that has imported everything; a signal stops them all."""

    def __init__(self, jobs: int, threads: int, interrupt: Interrupt) -> None:
        self.jobs = jobs
        self.threads = threads
        self.interrupt = interrupt
        self.tasks: list[Task] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([worker.__name__])

    @property
    def full(self) -> bool:
        """Whether no further task may be started now."""
        return len(self.tasks) >= self.jobs

    def start(self, name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Start `work` in a process of its own."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=worker.serve, args=(theirs, self.threads, work, *arguments), name=name
        )
        process.start()
        theirs.close()
        self.tasks.append(Task(name, process, ours))

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
