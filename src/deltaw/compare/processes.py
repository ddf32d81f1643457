"""Work in processes of their own, a few at a time; each starts with all libraries imported."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from deltaw.compare import worker
from deltaw.errors import RunError

GRACE = 60.0
"""Seconds that a process has to write a checkpoint before it is killed."""


@dataclass
class Task:
    """A process at work."""

    name: str
    process: BaseProcess
    connection: Connection

    def outcome(self) -> tuple[str, Any]:
        """Return what came of the work, once it has ended.

        Raises:
            RunError: if the process died without a word.
        """
        try:
            found: tuple[str, Any] = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            killed = " (killed; perhaps for want of memory)" if code == -9 else ""
            raise RunError(
                f"The process of {self.name} ended with code {code}{killed}.\n"
                "Fix: the same command goes on from there; with fewer --jobs each has more memory."
            ) from None
        self.process.join()
        return found


class Pool:
    """Starts processes from one that has imported everything."""

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs = jobs
        self.threads = threads
        self.tasks: list[Task] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([worker.__name__])

    @property
    def full(self) -> bool:
        """Whether no further task may be started now."""
        return len(self.tasks) >= self.jobs

    def start(self, name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> Task:
        """Start `work` in a process of its own."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=worker.serve, args=(theirs, self.threads, work, *arguments), name=name
        )
        process.start()
        theirs.close()
        task = Task(name, process, ours)
        self.tasks.append(task)
        return task

    def ended(self, timeout: float) -> list[Task]:
        """Return the tasks that ended, which leave the pool, or none after `timeout` seconds."""
        ready = wait([task.connection for task in self.tasks], timeout)
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
