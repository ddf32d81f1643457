"""Singular values of a ΔW: from its factors exactly, from a matrix exactly or by a random sketch.

Of a product L R with thin factors, two QR decompositions leave a core of its rank,

    L = Q X,  Rᵀ = P Y,  L R = Q (X Yᵀ) Pᵀ = (Q U) S (P V)ᵀ   with   X Yᵀ = U S Vᵀ,

so that no (out, in) matrix is formed. The sketch is that of arXiv 0909.4061, algorithms 4.4 and
5.1, with `OVERSAMPLING` further columns and `POWERS` power iterations.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.combine._deltas import Product

OVERSAMPLING = 16
POWERS = 4
SMALL = 512
"""A matrix with a side up to this is decomposed exactly."""
FIRST = 32
"""The rank that is tried first where only the energy to keep is known."""


@dataclass(frozen=True)
class Spectrum:
    """M ≈ U diag(S) Vᵀ with S descending; `rest` is the part of ‖M‖² that a sketch left out."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    rest: float = 0.0

    @property
    def total(self) -> float:
        """Return ‖M‖²."""
        return self.lost(0)

    def cut(self, n: int) -> Product:
        """Return the best product of rank n, with √S on both sides."""
        root = self.S[:n].sqrt()
        return Product(self.U[:, :n] * root, root[:, None] * self.Vh[:n])

    def lost(self, n: int) -> float:
        """Return the sum of all σ² but the first n."""
        return self.rest + float(self.S[n:].double().square().sum())


class Limit(NamedTuple):
    """How much of a ΔW to keep: a rank, a share of Σσ², or all that is not rounding."""

    rank: int | None = None
    energy: float | None = None

    def shared(self, groups: int) -> "Limit":
        """Return the limit of each of so many groups."""
        return self if self.rank is None else Limit(max(1, self.rank // groups))

    def of(self, spectrum: Spectrum) -> int | None:
        """Return the rank to cut at, 1 at least; None where the energy needs more than is known."""
        S = spectrum.S
        if self.rank is not None:
            return min(self.rank, len(S))
        if self.energy is not None:
            sums = S.double().square().cumsum(0)
            enough = sums >= self.energy * spectrum.total * (1 - torch.finfo(S.dtype).eps)
            return int(enough.int().argmax()) + 1 if enough.any() else None
        return max(1, int((S > 0).sum()))


def of_product(part: Product) -> Spectrum:
    """Return the exact spectrum of L R; what is rounding beside its factors counts as zero."""
    L, R, _ = part
    Q, X = torch.linalg.qr(L)
    P, Y = torch.linalg.qr(R.T)
    U, S, Vh = torch.linalg.svd(X @ Y.T, full_matrices=False)
    noise = L.norm() * R.norm() * max(len(L), R.shape[1]) * torch.finfo(S.dtype).eps
    return Spectrum(Q @ U, torch.where(noise < S, S, 0), Vh @ P.T)


def of_matrix(M: Tensor, limit: Limit, exact: bool = False, seed: int = 0) -> Spectrum:
    """Return the spectrum of M as far as `limit` needs it."""
    generator = torch.Generator().manual_seed(seed)
    smallest = min(M.shape)
    width = OVERSAMPLING + (limit.rank or FIRST)
    sketches = not exact and limit != Limit() and smallest > SMALL
    while sketches and 4 * width <= smallest:
        found = _sketch(M, width, generator)
        if limit.of(found) is not None:
            return found
        width *= 2
    return Spectrum(*torch.linalg.svd(M, full_matrices=False))


def _sketch(M: Tensor, width: int, generator: torch.Generator) -> Spectrum:
    Q = torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype, device="cpu")
    for _ in range(POWERS):
        Q = torch.linalg.qr(M.T @ torch.linalg.qr(M @ Q)[0])[0]
    Q = torch.linalg.qr(M @ Q)[0]
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    total = float(torch.linalg.vector_norm(M, dtype=torch.float64)) ** 2
    return Spectrum(Q @ U, S, Vh, max(0.0, total - float(S.double().square().sum())))
