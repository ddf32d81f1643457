"""The report of a comparison: one HTML page that needs nothing else, all text escaped."""

import json
from collections.abc import Sequence
from html import escape

from deltaw.compare import plots, table
from deltaw.compare.record import Record
from deltaw.compare.search import standing
from deltaw.compare.summary import Row, Summary

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tr.tie { background: var(--soft); }
figure { margin: 1rem 0; background: #fff; color: #000; border-radius: 6px; padding: .5rem; }
svg { width: 100%; height: auto; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; }
"""


def write(record: Record, summary: Summary, rows_tested: int | None) -> str:
    """Return the page."""
    title = "Comparison of " + (
        f"{len(summary.rows)} methods" if len(summary.rows) != 1 else "one method"
    )
    parts = [f"<h1>{title}</h1>", f"<p>{escape(_task(record))}</p>"]
    if summary.rows:
        parts += [_table(summary), _notes(summary, rows_tested)]
        pictures = [
            ("Score against trained parameters", plots.scores(summary)),
            ("Training loss", plots.losses(record, summary)),
            ("Memory against time", plots.costs(summary)),
            ("Learning rates tried", plots.rates(record, summary)),
        ]
        drawn = [(head, picture) for head, picture in pictures if picture is not None]
        svgs = plots.unique([picture for _, picture in drawn])
        for (head, _), svg in zip(drawn, svgs, strict=True):
            parts.append(f"<h2>{head}</h2><figure>{svg}</figure>")
        parts += [_seeds(record, summary), _search(record)]
    parts.append(_settings(record))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _task(record: Record) -> str:
    model, data = record.shared.get("model"), record.shared.get("data")
    return f"Model {model}, data {data}. Every method has one split of the data and its own rate."


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """Return a table; `marks` are the classes of its rows."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for index, row in enumerate(rows):
        mark = f' class="{marks[index]}"' if marks and marks[index] else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _table(summary: Summary) -> str:
    head = (table.HEADINGS[0], summary.metric, *table.HEADINGS[2:])
    marks = ["tie" if row.is_best or row.is_tie else "" for row in summary.rows]
    return _rows(
        head, [table.cells(row) for row in summary.rows], marks if _has_ties(summary) else ()
    )


def _notes(summary: Summary, rows_tested: int | None) -> str:
    lines = [escape(line) for line in table.notes(summary, rows_tested)]
    marked = "The rows with a grey ground are the best and its ties." if _has_ties(summary) else ""
    return "<p>" + "<br>\n".join([*lines, marked]) + "</p>"


def _has_ties(summary: Summary) -> bool:
    return len(summary.rows) > 1 and summary.rows[0].score.count > 1


def _seeds(record: Record, summary: Summary) -> str:
    def score(row: Row, seed: int) -> str:
        return f"{row.scores[seed]:.4f}" if seed in row.scores else "diverged"

    head = ["method", *(f"seed {seed}" for seed in record.seeds)]
    rows = [[row.title, *(score(row, seed) for seed in record.seeds)] for row in summary.rows]
    return f"<h2>Test {escape(summary.metric)} of every seed</h2>" + _rows(head, rows)


def _search(record: Record) -> str:
    rows = []
    for title in record.compared:
        found = standing(title, record.rates[title], record.seeds, record.score)
        for trial in found.done:
            entry = record.runs[trial.key]
            if trial not in found.final:
                rows.append([trial.key, str(entry["diverged"] or f"{entry['validation']:.4f}")])
    if not rows:
        return ""
    head = ("run", f"validation {record.metric}")
    return "<h2>Runs that chose the rates</h2>" + _rows(head, rows)


def _settings(record: Record) -> str:
    rows = []
    for title in record.compared:
        seen = record.examined[title]
        rows.append(
            [
                title,
                seen["adapted"],
                ", ".join(f"{rate:g}" for rate in record.rates[title]),
                json.dumps(record.methods[title], ensure_ascii=False),
            ]
        )
    head = ("method", "what is trained", "rates", "recipe keys of its own")
    shared = json.dumps(record.shared, indent=1, ensure_ascii=False)
    machine = ", ".join(f"{key} {value}" for key, value in record.machine.items())
    return (
        "<h2>Settings</h2>"
        + _rows(head, rows)
        + f"<p>Shared by all, with steps of the longest run: {escape(_steps(record))}</p>"
        + f"<pre>{escape(shared)}</pre><p>{escape(machine)}</p>"
    )


def _steps(record: Record) -> str:
    return f"{max(record.examined[title]['steps'] for title in record.compared):,}"
