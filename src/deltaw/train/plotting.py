"""The picture of a run's losses: those that were logged, smoothed ones, and those of evaluations.

A smoothed loss is the mean of those up to it, each step back counting `KEPT` times as much, which
is an exponential moving average without the pull of its first value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

PICTURE = "training_loss.png"
KEPT = 0.9
WIDTH, HEIGHT = 7.2, 4.2
"""Inches."""


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the losses that a Trainer has logged."""
    from matplotlib.figure import Figure  # late, for it is only there where pictures are asked for

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    steps, losses = logged(history, "loss")
    axes.plot(steps, losses, color="#4269d055", linewidth=1, label="training")
    axes.plot(steps, smoothed(losses), color="#4269d0", linewidth=1.6, label="training, smoothed")
    steps, losses = logged(history, "eval_loss")
    if steps:
        axes.plot(steps, losses, "o-", color="#ff725c", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#8884", linewidth=0.5)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def logged(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps of a logged number, and the number."""
    found = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the moving average of values.

    s_n = Σ_{i <= n} KEPT^(n - i) v_i / Σ_{i <= n} KEPT^(n - i)
    """
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = KEPT * total + value, KEPT * weight + 1
        found.append(total / weight)
    return found
