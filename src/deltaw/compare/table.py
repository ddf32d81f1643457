"""The table of a comparison as text that is read in a terminal and as Markdown."""

from deltaw.compare.statistics import LEVEL
from deltaw.compare.summary import Row, Summary
from deltaw.train.data.wording import counted, size
from deltaw.train.escape import printable

HEADINGS = ("method", "score", "against the best", "trained", "file", "s/step", "peak", "rate")
FIRST_TO_GO = (6, 5, 4, 3)
"""The columns that a narrow terminal does without, in this order."""


def write(summary: Summary, rows_tested: int | None, width: int | None = None) -> str:
    """Return the table and, below it, how to read it; costs that `width` has no room for go."""
    if not summary.rows:
        return "No method has finished."
    headings = (HEADINGS[0], summary.metric, *HEADINGS[2:])
    rows = [headings, *(cells(row) for row in summary.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = list(range(len(headings)))
    gone: list[str] = []
    for column in FIRST_TO_GO:
        if width is not None and sum(widths[at] + 3 for at in left) + 1 > width:
            left.remove(column)
            gone.insert(0, headings[column])
    lines = [_line([row[at] for at in left], [widths[at] for at in left]) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (widths[at] + 2) for at in left) + "|")
    if gone:
        lines.append(f"({', '.join(gone)}: in the files)")
    return "\n".join([*lines, "", *notes(summary, rows_tested)])


def _line(row: list[str], widths: list[int]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
    return f"| {' | '.join(padded)} |"


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of one row, under `HEADINGS`."""
    return (
        title_of(row),
        score_of(row),
        difference_of(row),
        trained_of(row),
        size(row.file_bytes),
        "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        "-" if row.peak_bytes is None else size(row.peak_bytes),
        f"{row.rate:g}" + (" *" if row.at_edge else ""),
    )


def title_of(row: Row) -> str:
    """Return the title without what would break a table."""
    return printable(row.title).replace("|", "/")


def score_of(row: Row) -> str:
    """Return `0.853 ± 0.004`, and how many seeds diverged."""
    error = "" if row.score.error is None else f" ± {row.score.error:.4f}"
    lost = f" ({row.diverged} diverged)" if row.diverged else ""
    return f"{row.score.value:.4f}{error}{lost}"


def difference_of(row: Row) -> str:
    """Return the paired difference to the best method, and whether it is a tie."""
    found = row.against_best
    if row.is_best:
        return "best"
    if found is None:
        return "-"
    if found.error is None:
        return f"{found.mean:+.4f}"
    tie = ", tie" if row.is_tie else ""
    return f"{found.mean:+.4f} ± {found.error:.4f}{tie}"


def trained_of(row: Row) -> str:
    """Return the trained parameters and their share."""
    return f"{row.trainable:,} ({100 * row.trainable / row.parameters:.2f}%)"


def notes(summary: Summary, rows_tested: int | None) -> list[str]:
    """Return how to read the table, and what it proves."""
    seeds = max(row.score.count for row in summary.rows)
    on = f" on {rows_tested:,} test rows" if rows_tested else ""
    lines = [f"{summary.metric}{on}: mean over {counted(seeds, 'seed')} ± standard error."]
    if seeds > 1:
        lines.append(
            "A tie is a paired difference within two standard errors. Seeds vary the start and "
            "the order of rows, not the rows: another split would vary more."
        )
        lines += _proofs(summary)
        if lost := [title_of(row) for row in summary.rows if row.diverged]:
            lines.append(
                f"{', '.join(lost)}: a seed diverged, so it is no tie and nothing is proven of it."
            )
    else:
        lines.append("One seed: no error is known, and small differences are noise.")
    if any(row.at_edge for row in summary.rows):
        lines.append("* the lowest or highest rate tried: a better one may lie beyond.")
    lines += [f"{printable(title)}: diverged {where}." for title, where in summary.failed]
    if summary.mixed:
        lines.append(
            "Runs were made with other versions, on other machines or with another number at once: "
            "do not compare their seconds and memory."
        )
    return lines


def _proofs(summary: Summary) -> list[str]:
    if len(summary.rows) < 2:
        return []
    test = f"paired t-test, Holm-corrected p < {LEVEL:g}"
    if not summary.proven:
        return [f"No method is proven better than another ({test})."]
    better: dict[str, list[str]] = {}
    for winner, loser, _ in summary.proven:
        better.setdefault(printable(winner), []).append(printable(loser))
    order = [printable(row.title) for row in summary.rows]
    return [
        f"Really better ({test}):",
        *(
            f"- {winner} than {', '.join(sorted(better[winner], key=order.index))}"
            for winner in order
            if winner in better
        ),
    ]
