"""Scores of a finished run."""

from collections.abc import Sequence
from pathlib import Path

from deltaw.errors import DataError, RunError
from deltaw.train.batches import Collator
from deltaw.train.choices import by_name
from deltaw.train.console import Console
from deltaw.train.data.dataset import Data
from deltaw.train.data.detect import Schema
from deltaw.train.data.evaluation import build_evaluation
from deltaw.train.data.examples import Example
from deltaw.train.data.overlaps import count_known
from deltaw.train.data.rows import Table
from deltaw.train.data.table import read_data
from deltaw.train.escape import printable
from deltaw.train.metrics import Score
from deltaw.train.opened import Opened, open_run
from deltaw.train.reading import read
from deltaw.train.receipt import all_skips
from deltaw.train.recipe import Recipe
from deltaw.train.scores import evaluate, table
from deltaw.train.tokens import encode


def evaluate_run(
    folder: Path,
    data: str | None,
    *,
    merge: bool = True,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Score:
    """Score a finished run on its own held-out rows, or on `data`, and print the table."""
    opened = open_run(folder, model=model, trust_remote_code=trust_remote_code)
    console = Console()
    examples, what, warning = _examples(opened, data)
    rows, _ = encode(opened.tokenizer, examples, opened.recipe.max_length)
    console.field("run", f"{opened.shown}, {opened.merge() if merge else 'adapter not merged'}")
    task = opened.task
    found = evaluate(opened.model, rows, Collator(opened.tokenizer), task)
    console.field("data", f"{found.rows:,} {what}")
    if warning:
        console.field("WARNING", warning)
    console.line(table([("score", found)], opened.recipe.metric or found.primary))
    return found


def _examples(opened: Opened, data: str | None) -> tuple[Sequence[Example], str, str]:
    """Return the rows to score, what they are, and a warning if they were trained on."""
    recipe = opened.recipe
    if data is None:
        if Path(recipe.data).is_absolute() and not Path(recipe.data).exists():
            raise RunError(
                f"The run's own data are no longer at {printable(recipe.data, 300)}.\n"
                "Fix: give the rows to score: deltaw eval RUN DATA"
            )
        own = read(recipe)
        if not _unchanged(own, recipe):
            raise RunError(
                "The data changed since the run, so rows held out now may have been trained on.\n"
                "Fix: give the rows to score: deltaw eval RUN DATA"
            )
        if not (own.test or own.validation):
            raise RunError("The run held no rows out. Fix: deltaw eval RUN DATA")
        rows = own.test or own.validation
        return rows, f"{'test' if own.test else 'validation'} rows that were not trained on", ""
    splits = read_data(data, encoding=recipe.encoding)
    chosen = splits.test or splits.validation or splits.train
    schema = Schema(tuple(recipe.text or ()), recipe.label or "", opened.task, "")
    part = build_evaluation(chosen, schema, opened.labels)
    warning = _trained_on(recipe, chosen, part.examples)
    what = [f"rows, {len(part.skipped):,} skipped", *all_skips(part.skipped)]
    return part.examples, "\n".join(what), warning


def _trained_on(recipe: Recipe, table: Table, examples: Sequence[Example]) -> str:
    """Return a warning if `examples` were trained on, told by their texts or by their file."""
    try:
        own = read(recipe)
    except DataError:
        own = None
    if own is None or not _unchanged(own, recipe):
        digests = (recipe.record or {}).get("data", {}).values()
        return "this file is part of the run's data" if table.sha256 in digests else ""
    known = count_known(examples, own.train)
    return f"{known:,} of these rows were trained on; the score flatters the run" if known else ""


def _unchanged(data: Data, recipe: Recipe) -> bool:
    """Tell whether the run's data are still what they were."""
    now = by_name(data.hashes)
    return now == (recipe.record or {}).get("data")
