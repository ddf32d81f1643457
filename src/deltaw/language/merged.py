"""Answers come faster where the adapter is in the weights, which are given back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

import deltaw
from deltaw.errors import MergeError
from deltaw.train.methods import IN_PLACE
from deltaw.train.packing import packing
from deltaw.train.recipe import Recipe


@contextmanager
def merged(model: nn.Module, recipe: Recipe, merge: bool = True) -> Iterator[str]:
    """Merge the adapter while the block lasts, where that is possible; yield what was done."""
    if recipe.method in IN_PLACE:
        yield "a model without adapters"
        return
    if not merge or packing(recipe) is not None:
        yield "adapter beside the weights"
        return
    try:
        deltaw.merge(model)
    except (MergeError, torch.OutOfMemoryError) as error:
        yield f"adapter not merged: {str(error).splitlines()[0]}"
        return
    try:
        yield "adapter merged into the weights"
    finally:
        deltaw.unmerge(model)
