"""Small models that the core tests share."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Four projections with odd widths, named as the field names them."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, 6, bias=False)
        self.k_proj = nn.Linear(width, 6)
        self.v_proj = nn.Linear(width, 6)
        self.o_proj = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        """Gate values by queries and keys."""
        return self.o_proj(torch.tanh(self.q_proj(x) + self.k_proj(x)) * self.v_proj(x))


class Block(nn.Module):
    """Attention, two experts and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.experts = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10)])
        self.norm = nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and both experts."""
        x = x + self.attn(x)
        return self.norm(x + sum(torch.tanh(expert(x)) for expert in self.experts))


class Tower(nn.Module):
    """An embedding, three blocks and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 10, padding_idx=0)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, position, 3) for token ids (batch, position)."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = torch.tensor([[1, 5, 0, 12], [7, 0, 3, 3]])


def shake(model: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Give every adapter tensor random values, so that ΔW is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(noise.to(parameter.dtype))
