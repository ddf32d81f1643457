"""What a merge changes in a model's outputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.errors import StateError
from deltaw.merging import merge, unmerge
from deltaw.verifying import call, tensors_of


@dataclass(frozen=True)
class Drift:
    """How far outputs moved: the mean and the largest |y' - y|, and the root mean square of y."""

    mean: float
    largest: float
    size: float

    def __str__(self) -> str:
        return (
            f"outputs differ by {self.mean:.2e} on average and by {self.largest:.2e} at most "
            f"(their root mean square is {self.size:.2e})"
        )


def measure_merge(
    model: nn.Module,
    batch: Any,
    *,
    original: str = "keep",
    requantize: bool = False,
    dtype: torch.dtype | None = None,
) -> Drift:
    """Merge the active adapters and return by how much that moved the outputs for one batch.

    The model is run in evaluation before and after, and stays merged. If it cannot be run after, as
    one that is not in `dtype` may not, it is unmerged again, unless `original` is `"none"`. Of an
    output of several tensors the first counts, which are the logits of models of transformers.

    Args:
        model: an adapted, unmerged model.
        batch: the input: a mapping of keyword arguments, a tuple or list of positional ones, or one
            tensor.
        original: as in `merge`.
        requantize: as in `merge`.
        dtype: as in `merge`.

    Raises:
        StateError: if the output holds no floating-point tensor; and whatever `merge` raises.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = _first(call(model, batch))
            merge(model, original=original, requantize=requantize, dtype=dtype)
            try:
                after = _first(call(model, batch))
            except BaseException:
                if original != "none":
                    unmerge(model)
                raise
    finally:
        model.train(training)
    difference = (after - before).abs()
    size = before.square().mean().sqrt()
    return Drift(difference.mean().item(), difference.max().item(), size.item())


def _first(output: Any) -> torch.Tensor:
    found = tensors_of(output)
    if not found:
        raise StateError("The output holds no floating-point tensor to compare.")
    return found[0].double()
