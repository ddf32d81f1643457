"""The sequential adapter of Houlsby et al. (arXiv 1902.00751), for comparing latencies alone."""

from typing import Any

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """h + up(relu(down(h))), after a sub-layer and before its residual connection."""

    def __init__(self, width: int, bottleneck: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, dtype=dtype)
        self.up = nn.Linear(bottleneck, width, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the adapted output of the sub-layer."""
        return hidden + self.up(torch.relu(self.down(hidden)))


def insert(model: Any, bottleneck: int) -> None:
    """Put two adapters into every block of a Llama: after attention and after the MLP."""
    width, dtype = model.config.hidden_size, model.dtype
    for block in model.model.layers:
        attention = block.self_attn
        attention.o_proj = nn.Sequential(attention.o_proj, Bottleneck(width, bottleneck, dtype))
        block.mlp = nn.Sequential(block.mlp, Bottleneck(width, bottleneck, dtype))
