"""What is seen while training: a live bar in a terminal, plain lines elsewhere, all in the log."""

import math
import time
from types import TracebackType
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from deltaw.train.console import Console

LINES = 20
"""Plain lines printed over a whole run."""


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss, examples per second, the time left and every evaluation."""

    def __init__(self, console: Console, batch: int, metric: str) -> None:
        self.console = console
        self.batch = batch
        self.metric = metric
        self.loss = "-"
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = 0.0
        self._first = 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and, in a terminal, the bar."""
        self._began, self._first = time.monotonic(), state.global_step
        terminal = Terminal()
        if terminal.is_terminal and not self.console.silent:
            self._bar = Progress(
                TextColumn("training "),
                BarColumn(bar_width=12),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} examples/s"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=terminal,
            )
            self._task = self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, loss=self.loss, rate="-"
            )
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the latest loss and log everything."""
        self.console.record("step", step=state.global_step, **(logs or {}))
        if logs and "loss" in logs:
            self.loss = f"{logs['loss']:.3f}"
            self._plain_line(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            rate = f"{self._rate(state):.0f}"
            self._bar.update(self._task, completed=state.global_step, loss=self.loss, rate=rate)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Print the validation score."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is not None:
            shown = f"step {state.global_step:>5}  validation {self.metric} {value:.3f}"
            if self._bar is not None:
                self._bar.console.print(f"          {shown}", highlight=False)
                self.console.record("text", text=shown)
            else:
                self.console.line(f"          {shown}")

    def _plain_line(self, state: Any) -> None:
        every = max(1, math.ceil(state.max_steps / LINES))
        if self._bar is None and (
            state.global_step % every == 0 or state.global_step == state.max_steps
        ):
            rate = self._rate(state)
            left = (state.max_steps - state.global_step) * self.batch / rate if rate else 0.0
            self.console.line(
                f"step {state.global_step:>5}/{state.max_steps}  loss {self.loss}  "
                f"{rate:.0f} examples/s  {duration(left)} left"
            )

    def _rate(self, state: Any) -> float:
        seconds = time.monotonic() - self._began
        return float((state.global_step - self._first) * self.batch / seconds) if seconds else 0.0


def duration(seconds: float) -> str:
    """Return a length of time as `12 s`, `3:05 min` or `1:02 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
