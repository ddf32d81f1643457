"""Training in several processes that find each other over gloo, several runs one after another."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deltaw.train.run", "deltaw.language.training.prepare"])


@dataclass(frozen=True)
class Task:
    """A run by a recipe's values; `stopped` is a process and a step at which it gets SIGTERM."""

    values: dict[str, Any]
    stopped: tuple[int, int] | None = None


def run(tasks: Sequence[Task], count: int = 2) -> list[list[str]]:
    """Return for each process how each of its runs ended: "", or the error's message."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in tasks]
    ports = [store.port for store in stores]
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_work, args=(rank, count, tasks, ports, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        found: dict[int, list[str]] = {}
        while waiting:
            for receiver in wait(list(waiting)):
                assert isinstance(receiver, Connection)
                found[waiting.pop(receiver)] = receiver.recv()  # of one that crashed: EOFError
        return [found[rank] for rank in range(count)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(
    rank: int, count: int, tasks: Sequence[Task], ports: Sequence[int], pipe: Connection
) -> None:
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    found = []
    for task, port in zip(tasks, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(_one(task, rank))
    pipe.send(found)


def _one(task: Task, rank: int) -> str:
    from deltaw.errors import DeltawError
    from deltaw.language.choosing import preparation, settle
    from deltaw.train.interrupt import Stopped
    from deltaw.train.loop import Flow
    from deltaw.train.recipe import parse
    from deltaw.train.run import train

    real = Flow.on_step_end

    def stopping(self: Flow, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if task.stopped == (rank, state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    Flow.on_step_end = stopping
    try:
        recipe = settle(parse(task.values))
        train(recipe, silent=True, prepare=preparation(recipe))
    except (DeltawError, Stopped) as error:
        return str(error)
    except SystemExit as end:
        return f"ended with {end.code}"
    finally:
        Flow.on_step_end = real
    return ""
