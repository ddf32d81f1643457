"""How well a language model foretells held-out texts: loss, perplexity, tokens right."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deltaw.errors import DivergedError
from deltaw.language.encoding.batches import Batch, Padding
from deltaw.language.encoding.encoder import Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.train.distributed.dividing import divided
from deltaw.train.metrics import REPLICAS, Score

NUMBERS, GPU_NUMBERS = 1 << 26, 1 << 28
"""Logits that are held at once, and on a GPU at most."""
GPU_SHARE = 160
"""Bytes of a GPU for each of them."""
ROWS = 64
DRAWN = 1_500_000
"""Numbers that are drawn at once."""

Sums = NDArray[np.float64]
Interval = tuple[float, float]


def measured(model: nn.Module, rows: Sequence[Row], padding: Padding) -> Sums:
    """Return for each row the summed loss, the tokens learnt and those foretold right, (rows, 3).

    Raises:
        DivergedError: if a loss is NaN or Inf.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    found = np.zeros((len(rows), 3))
    training = model.training
    model.eval()
    lengths = [max(len(row.input_ids), len(row.labels)) for row in rows]
    pieces = batches(lengths, vocabulary, room(device.type == "cuda"))

    def of(some: Sequence[int]) -> Sums:
        batch = padding([_as_row(rows[index]) for index in some])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return of_batch(model, batch).double().cpu().numpy()  # type: ignore[no-any-return]

    with torch.no_grad():
        for some, sums in zip(pieces, divided(pieces, of), strict=True):
            found[some] = sums
    model.train(training)
    broken = int((~np.isfinite(found[:, 0])).sum())
    if broken:
        raise DivergedError(
            f"The model's loss is not finite for {broken:,} of {len(rows):,} rows: its weights are "
            "damaged, or its training diverged.\n"
            "Fix: train again with a smaller learning rate, or take another model."
        )
    return found


def room(gpu: bool) -> int:
    """Return how many logits are held at once; a GPU with more memory holds more of them."""
    if not gpu:
        return NUMBERS
    return min(GPU_NUMBERS, max(NUMBERS, torch.cuda.mem_get_info()[1] // GPU_SHARE))


def batches(lengths: Sequence[int], vocabulary: int, numbers: int = NUMBERS) -> list[list[int]]:
    """Return the numbers of all rows, shortest first, cut where logits would be too many."""
    found: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = found[-1]
        full = (len(last) + 1) * lengths[index] * vocabulary > numbers or len(last) == ROWS
        if last and full:
            found.append([])
        found[-1].append(index)
    return found if lengths else []


def of_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Return the same of each row of a batch, (rows, 3)."""
    logits, labels = _foretold(model, batch)
    logits, learnt = logits.float(), labels != MASKED
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=MASKED, reduction="none"
    ).view_as(labels)
    right = (logits.argmax(-1) == labels) & learnt
    return torch.stack([losses.sum(-1), learnt.sum(-1).float(), right.sum(-1).float()], -1)


def score(found: Sums, seed: int = 0) -> Score:
    """Return the loss per learnt token, exp of it, and the share of tokens that were right.

    `L = Σ_rows loss / Σ_rows tokens`; intervals are 95% of resampled rows.
    """
    values = {name: float(value) for name, value in ratios(found.sum(0)).items()}
    drawn = ratios(resampled(found, seed))
    intervals = {name: interval(drawn[name]) for name in values}
    return Score("loss", values, intervals, len(found))


def difference(before: Sums, after: Sums, seed: int = 0) -> tuple[float, Interval]:
    """Return how much lower or higher the loss of the same rows became, with its 95% interval.

    Both are resampled together, so that what is common to them does not widen the interval.
    """
    drawn = [ratios(resampled(found, seed))["loss"] for found in (before, after)]
    value = ratios(after.sum(0))["loss"] - ratios(before.sum(0))["loss"]
    return float(value), interval(drawn[1] - drawn[0])


def resampled(found: Sums, seed: int) -> Sums:
    """Return the sums over rows of (rows, k) drawn with replacement, (replicas, k)."""
    generator = np.random.default_rng(seed)
    size = max(1, DRAWN // found.size)
    parts = []
    for start in range(0, REPLICAS, size):
        shape = (min(size, REPLICAS - start), len(found))
        parts.append(found[generator.integers(0, len(found), shape)].sum(1))
    return np.concatenate(parts)


def interval(values: NDArray[np.float64]) -> Interval:
    """Return the 2.5% and the 97.5% quantile."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def ratios(sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the scores of sums of loss, tokens and right tokens, (..., 3)."""
    loss = sums[..., 0] / sums[..., 1]
    with np.errstate(over="ignore"):
        perplexity = np.minimum(np.exp(loss), 1e12)
    return {"loss": loss, "perplexity": perplexity, "tokens_right": sums[..., 2] / sums[..., 1]}


def _as_row(row: Row) -> dict[str, list[int]]:
    return {"input_ids": row.input_ids, "labels": row.labels}


def _foretold(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits and the labels that they are for; of a causal model the next token's."""
    if model.config.is_encoder_decoder:
        return model(**batch, use_cache=False)["logits"], batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False)["logits"][:, :-1], batch["labels"][:, 1:]
