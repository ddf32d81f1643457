"""The pictures of a report as SVG text: no file, no network, titles never read as markup."""

import io
import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from deltaw.compare.record import Record
from deltaw.compare.search import standing
from deltaw.compare.summary import Row, Summary
from deltaw.train.data.wording import size
from deltaw.train.escape import printable

COLORS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
    "#9c6b4e", "#9498a0",
)  # fmt: skip
MARKERS = "osD^vP"
WIDTH, HEIGHT = 7.2, 4.2
"""Inches."""
MARGIN = 1.1
"""How far axes that begin at zero go beyond the largest value."""


def scores(summary: Summary) -> str:
    """Draw the score of each method against its trained parameters, with standard errors."""
    figure, axes = _blank("trained parameters", f"test {summary.metric}")
    counts = [row.trainable for row in summary.rows]
    axes.set_xscale("log")
    axes.set_xlim(min(counts) / 2, max(counts) * 2)
    for index, row in enumerate(summary.rows):
        axes.errorbar(
            row.trainable,
            row.score.value,
            yerr=row.score.error or 0.0,
            capsize=3,
            linestyle="none",
            **_style(index),
            label=_name(row.title),
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    return _drawn(figure, axes, "The score of each method against its trained parameters")


def costs(summary: Summary) -> str | None:
    """Draw peak memory against the time of a step, or nothing where neither is known."""
    known = [
        (index, row)
        for index, row in enumerate(summary.rows)
        if row.seconds_per_step is not None and row.peak_bytes is not None
    ]
    if not known:
        return None
    figure, axes = _blank("seconds per step", "peak memory beside the libraries")
    for index, row in known:
        axes.plot(
            row.seconds_per_step,
            row.peak_bytes,
            linestyle="none",
            **_style(index),
            label=_name(row.title),
        )
    axes.set_xlim(0, MARGIN * max(row.seconds_per_step or 0.0 for _, row in known))
    axes.set_ylim(0, MARGIN * max(row.peak_bytes or 0 for _, row in known))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(round(value))))
    return _drawn(figure, axes, "Peak memory of each method against the time of a step")


def losses(record: Record, summary: Summary) -> str:
    """Draw the training loss of each method: the mean over seeds, one deviation to each side."""
    figure, axes = _blank("step", "training loss")
    for index, row in enumerate(summary.rows):
        values: dict[float, list[float]] = {}
        for curve in _curves(record, row):
            for step, loss in curve:
                values.setdefault(step, []).append(loss)
        steps = sorted(values)
        middle = [statistics.fmean(values[step]) for step in steps]
        color = COLORS[index % len(COLORS)]
        dashes = "-" if index < len(COLORS) else "--"
        axes.plot(steps, middle, dashes, color=color, linewidth=1.3, label=_name(row.title))
        if all(len(some) > 1 for some in values.values()):
            spread = [statistics.stdev(values[step]) for step in steps]
            low = [value - half for value, half in zip(middle, spread, strict=True)]
            high = [value + half for value, half in zip(middle, spread, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    return _drawn(figure, axes, "Training loss of each method: mean over seeds, and one deviation")


def _curves(record: Record, row: Row) -> list[list[list[float]]]:
    trials = standing(row.title, record.rates[row.title], record.seeds, record.score).final
    entries = [record.runs[trial.key] for trial in trials]
    return [entry["loss"] for entry in entries if not entry["diverged"]]


def rates(record: Record, summary: Summary) -> str | None:
    """Draw the validation score of every rate that was tried, or nothing where one was."""
    if all(len(record.rates[row.title]) < 2 for row in summary.rows):
        return None
    figure, axes = _blank("learning rate", f"validation {summary.metric}")
    axes.set_xscale("log")
    for index, row in enumerate(summary.rows):
        found = standing(row.title, record.rates[row.title], record.seeds, record.score)
        last = {
            trial.rate: record.runs[trial.key]["validation"]
            for trial in found.done
            if trial.seed == record.seeds[0] and not record.runs[trial.key]["diverged"]
        }
        points = sorted(last.items())
        axes.plot(
            [rate for rate, _ in points],
            [value for _, value in points],
            linewidth=0.8,
            **_style(index),
            label=_name(row.title),
        )
    return _drawn(figure, axes, "Validation score of each rate after its longest run")


def _blank(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across, parse_math=False)
    axes.set_ylabel(up, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#8884", linewidth=0.5)
    return figure, axes


def _style(index: int) -> dict[str, str]:
    marker = MARKERS[index // len(COLORS) % len(MARKERS)]
    return {"color": COLORS[index % len(COLORS)], "marker": marker}


def _name(title: str) -> str:
    """Return a title that matplotlib shows as it is: never as mathematics, never hidden."""
    shown = printable(title, 40).replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def _count(value: float) -> str:
    """Return 1,500,000 as `1.5M`."""
    if value < 1:
        return ""
    power = min(3, int(math.log10(value) + 1e-9) // 3)
    return f"{value / 1000**power:g}{('', 'k', 'M', 'B')[power]}"


def _drawn(figure: Figure, axes: Axes, description: str) -> str:
    """Return the SVG element of a figure, with a legend beside it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    start = text.index("<svg")
    return text[start:].replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def unique(pictures: Sequence[str]) -> list[str]:
    """Return SVG elements that can stand in one page: the names in each are its own."""
    return [
        picture.replace('id="', f'id="p{index}-')
        .replace('xlink:href="#', f'xlink:href="#p{index}-')
        .replace("url(#", f"url(#p{index}-")
        for index, picture in enumerate(pictures)
    ]
