"""Whether the loss has left its course, told from the losses of the steps before alone.

A loss stands out if it lies above all of the last steps', and above their median m by twice what
the largest of them M does, and by a twentieth of the first loss L of the run at least:

    loss > m + max(2 (M - m), L / 20)

It has left its course when five steps in a row stand out. Where the losses of steps are
exchangeable, however their noise is distributed, the last five of n + 5 are the five largest with
probability 1 / C(n + 5, 5): once in 400,000 steps at n = 32, in 11 million at n = 64, before the
distance is asked for. One bad batch, or a slow rise, never counts.
"""

import statistics
from collections import deque
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

WINDOW = 64
"""Steps that a loss is compared with."""
FEWEST = 32
"""Steps before the first loss is judged."""
PATIENCE = 5
"""Steps in a row that must stand out."""


class Watchdog(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sees the loss of every step; what it has seen is part of a checkpoint."""

    def __init__(self) -> None:
        """`began` is the first of the steps in a row whose losses, `high`, stand out now."""
        self.first: float | None = None
        self.usual: deque[float] = deque(maxlen=WINDOW)
        self.high: list[float] = []
        self.began: int | None = None

    def see(self, step: int, loss: float) -> None:
        """Take note of the loss of a step."""
        if self.first is None:
            self.first = loss
        if self.stands_out(loss):
            self.began = step if self.began is None else self.began
            self.high.append(loss)
        else:
            self.accept()
            self.usual.append(loss)

    def accept(self) -> None:
        """Count the losses that stood out as usual ones."""
        self.usual.extend(self.high)
        self.high.clear()
        self.began = None

    def stands_out(self, loss: float) -> bool:
        """Tell whether a loss is far above those of the last steps."""
        if self.first is None or len(self.usual) < FEWEST or loss <= max(self.usual):
            return False
        middle = statistics.median(self.usual)
        return loss > middle + max(2 * (max(self.usual) - middle), self.first / 20)

    @property
    def alarmed(self) -> bool:
        """Whether the loss has left its course."""
        return len(self.high) >= PATIENCE

    def state(self) -> dict[str, Any]:
        """Return what has been seen, as a checkpoint keeps it."""
        seen = {"first": self.first, "usual": list(self.usual), "high": list(self.high)}
        return {"args": {}, "attributes": {**seen, "began": self.began}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the checkpoint that is resumed from had seen."""
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.first = kept.get("first")
        self.usual = deque(kept.get("usual", ()), WINDOW)
        self.high = list(kept.get("high", ()))
        self.began = kept.get("began")
