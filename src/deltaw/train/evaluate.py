"""Scores of a model on held-out rows, while training and of a finished run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import DataError, DivergedError, RunError
from deltaw.train.batches import Collator
from deltaw.train.console import Console
from deltaw.train.data.dataset import Data
from deltaw.train.data.detect import Schema, Task
from deltaw.train.data.evaluation import build_evaluation
from deltaw.train.data.examples import Example
from deltaw.train.data.overlaps import count_known
from deltaw.train.data.rows import Table
from deltaw.train.data.table import read_data
from deltaw.train.escape import printable
from deltaw.train.metrics import Score, score
from deltaw.train.opened import Opened, open_run
from deltaw.train.prepare import read
from deltaw.train.recipe import Recipe
from deltaw.train.tokens import Encoded, encode

BATCH = 32


def logits(model: nn.Module, rows: Sequence[Encoded], collator: Collator) -> Tensor:
    """Return the model's outputs, (rows, outputs) in float32 on the CPU, without dropout.

    Raises:
        DivergedError: if an output is NaN or Inf.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))  # type: ignore[arg-type]
    training = model.training
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            batch = collator([rows[index] for index in order[start : start + BATCH]])
            batch.pop("labels", None)
            out = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            parts.append(out["logits"].float().cpu())
    model.train(training)
    found = torch.cat(parts)
    broken = int((~found.isfinite()).any(-1).sum())
    if broken:
        raise DivergedError(
            f"The model's outputs are not finite for {broken:,} of {len(rows):,} rows: its weights "
            "are damaged, or its training diverged.\n"
            "Fix: train again with a smaller learning rate, or take another model."
        )
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


def predictions(task: Task, outputs: Tensor) -> list[float]:
    """Return class indices, or the real numbers of a regression."""
    values = outputs.argmax(-1) if task == "classification" else outputs[:, 0]
    return values.tolist()  # type: ignore[no-any-return]


def evaluate(model: nn.Module, rows: Sequence[Encoded], collator: Collator, task: Task) -> Score:
    """Return the scores of `model` on labelled rows."""
    labels = [float(row["labels"]) for row in rows]  # type: ignore[arg-type]
    return score(task, labels, predictions(task, logits(model, rows, collator)))


def table(scores: Sequence[tuple[str, Score]], first: str) -> str:
    """Return scores side by side, the metric `first` on top, with the last one's 95% interval."""
    names = sorted(scores[-1][1].values, key=lambda name: name != first)
    head = " " * 12 + "".join(f"{title:>10}" for title, _ in scores) + "   95% interval"
    lines = [head]
    for name in names:
        low, high = scores[-1][1].intervals[name]
        values = "".join(f"{found.values[name]:>10.3f}" for _, found in scores)
        lines.append(f"{name:<12}{values}   {low:.3f} to {high:.3f}")
    return "\n".join(lines)


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
    return part.examples, f"rows, {len(part.skipped):,} skipped", warning


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
    now = {Path(path).name: digest for path, digest in data.hashes.items()}
    return now == (recipe.record or {}).get("data")
