"""Trained rows of tokens in PEFT's files: the rows as tensors, the tokens in the settings."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.formats._parts import TOKEN_IDS, TOKENS
from deltaw.patterns import ends_with
from deltaw.state import LayerState

SUFFIX = "token_adapter.trainable_tokens_delta"


def with_ids(path: str, layer: LayerState, config: LoraConfig) -> LayerState:
    """Return the layer with the tokens that its rows are for."""
    if TOKENS not in layer.tensors:
        return layer
    ids = torch.tensor(_asked(path, config), dtype=torch.int64)
    return replace(layer, tensors={**layer.tensors, TOKEN_IDS: ids})


def problems(path: str, rows: Tensor, config: LoraConfig) -> list[str]:
    """Return what is wrong with the rows (n, width) of the table at `path`."""
    count = len(_asked(path, config))
    if rows.dim() == 2 and rows.is_floating_point() and len(rows) == count:
        return []
    return [
        f"{path!r}: the file has rows {tuple(rows.shape)} in {rows.dtype}, and "
        f"trainable_token_indices has {count} tokens"
    ]


def _asked(path: str, config: LoraConfig) -> list[int]:
    asked = config.trainable_token_indices or []
    if isinstance(asked, Mapping):
        asked = next((ids for name, ids in asked.items() if ends_with(path, name)), [])
    return list(asked)


def ids_of(layers: Mapping[str, LayerState]) -> dict[str, list[int]] | None:
    """Return the tokens of every table, or None where there are none."""
    tables = {
        p: layer.tensors[TOKEN_IDS] for p, layer in layers.items() if TOKEN_IDS in layer.tensors
    }
    return {path: ids.tolist() for path, ids in tables.items()} or None
