"""Rows of tokens in batches, and several short rows in one without seeing each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError
from deltaw.language.encoding.encoder import Row
from deltaw.language.encoding.labelling import MASKED

Batch = dict[str, Tensor]


class Padding:
    """Pads rows to the longest of their batch, labels by themselves where they are a target.

    Where rows have `position_ids`, which begin anew with every document, these keep documents
    apart and there is no mask; the padding is a document of its own.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return `input_ids`, `labels` and a mask or positions, each (rows, longest)."""

        def padded(name: str, value: int) -> Tensor:
            longest = max(len(row[name]) for row in rows)
            return torch.tensor([[*r[name], *[value] * (longest - len(r[name]))] for r in rows])

        batch = {"input_ids": padded("input_ids", self.pad), "labels": padded("labels", MASKED)}
        longest = batch["input_ids"].shape[1]
        if "position_ids" in rows[0]:
            positions = [
                [*row["position_ids"], *range(longest - len(row["input_ids"]))] for row in rows
            ]
            return batch | {"position_ids": torch.tensor(positions)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = torch.arange(longest)[None] < lengths[:, None]
        return batch | {"attention_mask": mask.long()}


def as_data(rows: Sequence[Row]) -> dict[str, list[list[int]]]:
    """Return rows as columns of a data set."""
    return {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
    }


def packed(rows: Sequence[Row], room: int) -> dict[str, list[list[int]]]:
    """Return columns whose rows hold several documents and at most `room` tokens each.

    Longest first, each document goes where it leaves the least room (best fit decreasing), in time
    linear in the rows but for `room`.

    Source: arXiv 2404.10830, section 3.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    for index in order:
        size = len(rows[index].input_ids)
        left = next((free for free in range(size, room + 1) if by_room[free]), None)
        if left is None:
            bins.append([])
            place, left = len(bins) - 1, room
        else:
            place = by_room[left].pop()
        bins[place].append(index)
        by_room[left - size].append(place)
    return {
        "input_ids": [[i for k in some for i in rows[k].input_ids] for some in bins],
        "labels": [[i for k in some for i in rows[k].labels] for some in bins],
        "position_ids": [[i for k in some for i in range(len(rows[k].input_ids))] for some in bins],
    }


def require_apart(model: nn.Module, rows: Sequence[Row]) -> None:
    """Raise `ConfigError` if documents that share a row would see each other in this model."""
    short = [row.input_ids[:16] for row in rows[:2]]
    if len(short) < 2:
        return
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor([[*short[0], *short[1]]], device=device)
    positions = torch.tensor([[*range(len(short[0])), *range(len(short[1]))]], device=device)
    with torch.no_grad():
        alone = model(torch.tensor([short[1]], device=device), use_cache=False)["logits"].float()
        together = model(ids, position_ids=positions, use_cache=False)["logits"].float()
    model.train(training)
    together = together[:, len(short[0]) :]
    if (alone - together).abs().max() > 0.02 * alone.abs().max().clamp(min=1e-6):
        raise ConfigError(
            f"packing=True: {type(model).__name__} lets documents that share a row see each other."
            "\nFix: leave packing out; rows of similar length are batched together anyway."
        )
