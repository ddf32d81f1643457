"""`nn.Embedding`: looking up row x is multiplying a one-hot vector, so W is (width, vocabulary)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.kernels.embedding import Term, embedding
from deltaw.layer import AdaptedLayer
from deltaw.parts import Part, factors, joinable, total_scale
from deltaw.state import LayerState
from deltaw.swap import origin_of

if TYPE_CHECKING:
    _Embedding = nn.Embedding
else:
    _Embedding = object


class Embedding(AdaptedLayer, _Embedding):
    """x (...) of token ids to y (..., width); the padding row gets no delta and no gradient.

    Subclasses that multiply the looked-up row by their `embed_scale` are scaled likewise.
    """

    kind = "embedding"
    takes = "nn.Embedding"
    zero_factor = "A"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take `nn.Embedding` and its scaled subclasses."""
        return isinstance(layer, nn.Embedding)

    @classmethod
    def refusals(cls, layer: nn.Module) -> list[str]:
        """Refuse sparse gradients."""
        sparse = ["sparse=True gives sparse gradients, which no adapter has"]
        return super().refusals(layer) + (sparse if getattr(layer, "sparse", False) else [])

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer looks rows up, and at most scales them by its `embed_scale`."""
        return origin_of(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (width, vocabulary)."""
        vocabulary, width = self.dense().shape
        return width, vocabulary

    def matrix(self, slot: str) -> Tensor:
        """Return the table as (width, vocabulary)."""
        return self.dense().T

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M as a table (vocabulary, width), its padding row zero."""
        if self.padding_idx is None:
            return M.T
        keep = torch.arange(M.shape[1], device=M.device) != self.padding_idx
        return torch.where(keep[:, None], M.T, 0)

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """Return Aᵀ, its padding row zero, and Bᵀ."""
        return self.layout(A, slot), B.T

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Return the columns x of M, scaled as the layer scales its rows."""
        return self.scaled(self.look_up(x, M))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Return B times the columns x of A."""
        dtype = self.dense().dtype
        return self.scaled(F.linear(self.look_up(x, A).to(dtype) * scale, B.to(dtype)))

    def fused(self, x: Tensor, parts: Sequence[Part]) -> Tensor | None:
        """Return base and parts from one kernel, for a frozen dense table."""
        if not self.joins() or not joinable(x, parts):
            return None
        undropped = [part._replace(p=0.0) for part in parts]
        terms = [Term(*factors(part), total_scale(part) * self.size()) for part in undropped]
        return embedding(self.base, x, self.padding_idx, terms)

    def look_up(self, x: Tensor, M: Tensor) -> Tensor:
        """Return the columns x of M as rows, zero for the padding token."""
        rows = F.embedding(x, M.T)
        if self.padding_idx is None:
            return rows
        return rows.masked_fill((x == self.padding_idx).unsqueeze(-1), 0)

    def scaled(self, rows: Tensor) -> Tensor:
        """Multiply rows as the layer multiplies its own."""
        size = self.size()
        return rows * (size.to(rows.dtype) if isinstance(size, Tensor) else size)

    def size(self) -> float | Tensor:
        """Return the `embed_scale` of scaled subclasses, which multiplies what is looked up."""
        size: float | Tensor = getattr(self, "embed_scale", 1.0)
        return size
