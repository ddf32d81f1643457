"""What launched processes do in tests."""

import os
import signal
import time
from pathlib import Path

from deltaw.errors import ConfigError
from deltaw.train.distributed import processes
from deltaw.train.distributed.dividing import divided
from deltaw.train.interrupt import Interrupt, Stopped

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


def note(folder: Path) -> None:
    """Write down by what this process finds the others."""
    rank = os.environ["RANK"]
    (folder / rank).write_text(" ".join(os.environ[name] for name in NAMES))


def fail(folder: Path) -> None:
    """Fail as the second process, and wait for ever as the first."""
    if os.environ["RANK"] == "1":
        raise ConfigError("no")
    time.sleep(600)


def vanish(folder: Path) -> None:
    """Be killed as the second process, and wait for ever as the first."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def stop(folder: Path) -> None:
    """Have the second process told to stop that started both, and wait for the signal."""
    with Interrupt("Stopped.") as interrupt:
        interrupt.waiting = True
        (folder / os.environ["RANK"]).touch()
        while os.environ["RANK"] == "1" and len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
        if os.environ["RANK"] == "1":
            os.kill(os.getppid(), signal.SIGINT)
        while interrupt.number is None:
            time.sleep(0.05)
    raise Stopped(interrupt.number, f"{os.environ['RANK']} stopped")


def divide(folder: Path) -> None:
    """Square five numbers together, and note which ones this process took and what all know."""
    took = []

    def square(number: int) -> int:
        took.append(number)
        return number**2

    with processes.together():
        found = divided(range(5), square)
        assert divided([], square) == []
    (folder / os.environ["RANK"]).write_text(f"{took} {found}")
