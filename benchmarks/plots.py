"""Plots of the page as SVG: bars with their spread, and curves.

The same numbers give the same file: no dates, no random ids, and text stays text.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import digits

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deltaw",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
OURS, OTHERS = "#2f6f9f", "#a8adb3"
LINES = (("#a8adb3", "-", 2.6), ("#2f6f9f", "--", 1.2))
"""Colour, style and width of the curves of one panel; the second is seen on top of the first."""


def bars(name: str, what: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Write one panel of bars per title, medians with a line from least to most.

    Returns the line of Markdown that shows the plot.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    size = (3.6 * len(panels) + 2.2, 0.26 * len(labels) + 0.9)
    with _style():
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            _panel(axis, title, what, panel, labels)
        return _write(figure, name, what)


def _panel(
    axis: Any, title: str, what: str, panel: Mapping[str, Sequence[float]], labels: Sequence[str]
) -> None:
    """Draw the bars of one panel, the first label on top."""
    places = {label: len(labels) - 1 - i for i, label in enumerate(labels)}
    longest = max(max(numbers) for numbers in panel.values())
    for label, numbers in panel.items():
        middle = statistics.median(numbers)
        axis.barh(places[label], middle, color=OURS if "deltaw" in label else OTHERS, height=0.7)
        axis.plot([min(numbers), max(numbers)], [places[label]] * 2, color="black", linewidth=1)
        axis.text(
            max(numbers) + 0.015 * longest, places[label], digits(middle), va="center", fontsize=8
        )
    axis.set_yticks(list(places.values()), list(places))
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.13 * longest)
    axis.set_xlabel(what)
    axis.set_title(title, fontsize=9)


def curves(
    name: str, what: str, along: str, panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """Write one panel of curves per title; return the line of Markdown that shows the plot."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(3.8 * len(panels), 2.8), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            for (label, numbers), (colour, style, width) in zip(
                panel.items(), LINES[: len(panel)], strict=True
            ):
                axis.plot(numbers, style, color=colour, linewidth=width, label=label)
            axis.set_xlabel(along)
            axis.set_title(title, fontsize=9)
        axes[0].set_ylabel(what)
        axes[0].legend(frameon=False)
        return _write(figure, name, what)


def along(
    name: str,
    what: str,
    axis_of: str,
    panels: Mapping[str, tuple[Mapping[int, Sequence[float]], Sequence[float]]],
    level: str,
) -> str:
    """Write one panel per title: points over numbers, doubling, and a `level` to compare with.

    Each point, and the level, has several values; the line from least to most is their spread.
    Returns the line of Markdown that shows the plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with _style():
        figure = Figure(figsize=(3.8 * len(panels), 2.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, (points, beside)) in zip(axes, panels.items(), strict=True):
            numbers = list(points)
            means = [statistics.fmean(points[number]) for number in numbers]
            spread = (
                [m - min(points[n]) for n, m in zip(numbers, means, strict=True)],
                [max(points[n]) - m for n, m in zip(numbers, means, strict=True)],
            )
            axis.errorbar(numbers, means, spread, color=OURS, marker="o", markersize=4, capsize=2)
            axis.axhline(statistics.fmean(beside), color="black", linestyle="--", linewidth=1)
            axis.axhspan(min(beside), max(beside), color=OTHERS, alpha=0.4, linewidth=0)
            axis.text(numbers[0], statistics.fmean(beside), level, va="bottom")
            axis.set_xscale("log", base=2)
            axis.set_xticks(numbers, [str(number) for number in numbers])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel(axis_of)
            axis.set_title(title, fontsize=9)
        return _write(figure, name, what)


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)


def _write(figure: Any, name: str, what: str) -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return f"![{what}]({FOLDER.name}/{name}.svg)"
