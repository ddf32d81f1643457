"""Training in a process of its own that is killed at a chosen moment.

A moment is one audit event of the interpreter (open, rename, remove, mkdir, ...) on a file of the
run's folder. They fall between training steps, where the log is written, and everywhere inside a
save.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
}
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deltaw.train.run"])


def run(
    values: dict[str, Any],
    *,
    moment: int | None = None,
    sent: signal.Signals = signal.SIGKILL,
) -> tuple[int, int, str]:
    """Train by a recipe in a fresh process; return its exit code, moments seen and last message.

    At the given moment the process gets a signal.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(values, moment, sent, sender))
    process.start()
    sender.close()
    moments, message = 0, ""
    try:
        while True:
            kind, value = receiver.recv()
            moments, message = (value, message) if kind == "moments" else (moments, value)
    except EOFError:
        pass
    process.join()
    assert process.exitcode is not None
    return process.exitcode, moments, message


def _train(
    values: dict[str, Any], moment: int | None, sent: signal.Signals, pipe: Connection
) -> None:
    from deltaw.errors import DeltawError
    from deltaw.train.interrupt import Stopped
    from deltaw.train.recipe import parse
    from deltaw.train.run import train

    folder = str(Path(values["output"]))
    seen = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(folder):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), sent)

    sys.addaudithook(audit)
    code = 0
    try:
        train(parse(values), silent=True)
    except Stopped as stop:
        pipe.send(("message", str(stop)))
        code = stop.exit_code
    except DeltawError as error:
        pipe.send(("message", str(error)))
        code = 1
    pipe.send(("moments", seen))
    pipe.close()
    os._exit(code)
