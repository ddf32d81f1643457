"""Ctrl-C and SIGTERM: a training loop ends at the next step with a checkpoint, all else at once."""

import os
import signal
from types import FrameType, TracebackType


class Stopped(BaseException):
    """The run was asked to stop by a signal; nothing is wrong."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells expect."""
        return 128 + self.number


class Interrupt:
    """Catches SIGINT and SIGTERM while its `with` block lasts.

    While `waiting` is true the first signal only sets `number`; otherwise, and the second time, it
    raises `Stopped(number, message)` where the program is. One of several processes that wait never
    raises: their launcher repeats signals, and ends them itself. A library that makes an error of
    its own of that (an import that was cut short) does not hide it: `Stopped` leaves the block.
    """

    def __init__(
        self, message: str = "Stopped. The same command goes on, or starts again."
    ) -> None:
        self.message = message
        self.waiting = False
        self.number: int | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number is not None and not self.waiting and isinstance(error, Exception):
            raise Stopped(self.number, self.message) from error

    def _caught(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and "WORLD_SIZE" not in os.environ
        self.number = number
        if again or not self.waiting:
            raise Stopped(number, self.message)
