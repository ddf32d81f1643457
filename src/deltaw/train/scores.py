"""Scores of a model on rows that are held out, and how they are shown."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.errors import DivergedError
from deltaw.train.batches import Collator
from deltaw.train.data.detect import Task
from deltaw.train.distributed.dividing import divided
from deltaw.train.metrics import Score, score
from deltaw.train.tokens import Encoded

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

    def of(start: int) -> Tensor:
        batch = collator([rows[index] for index in order[start : start + BATCH]])
        batch.pop("labels", None)
        out: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
        return out.float().cpu()

    with torch.no_grad():
        found = torch.cat(divided(range(0, len(order), BATCH), of))
    model.train(training)
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
    named = f" ({scores[-1][0]})" if len(scores) > 1 else ""
    names = sorted(scores[-1][1].values, key=lambda name: name != first)
    head = " " * 12 + "".join(f"{title:>10}" for title, _ in scores) + f"   95% interval{named}"
    lines = [head]
    for name in names:
        low, high = scores[-1][1].intervals[name]
        values = "".join(f"{found.values[name]:>10.3f}" for _, found in scores)
        lines.append(f"{name:<12}{values}   {low:.3f} to {high:.3f}")
    return "\n".join(lines)
