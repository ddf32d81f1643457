"""Singular vectors of stacks of matrices: the principal ones by products alone, or by a whole SVD.

Source: arXiv 0909.4061, algorithms 4.1 and 4.3 (a random range and power passes); arXiv 1504.05477,
algorithm 2 (keep the range of every pass, a block Krylov space). Bases are made orthonormal through
the eigenvectors of their Gram matrix in float64.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltaw.inits import Factors, Site

BYTES = 1 << 28
"""How many bytes of weights are decomposed at once."""
PASSES = 2
LEAST = 8
"""The least number of random columns beyond those asked for."""
INDEPENDENT = 1e-10
"""What of the largest eigenvalue of a Gram matrix one must have to count as a direction."""

Triple = tuple[Tensor, Tensor, Tensor]


def split(triple: Triple, scale: float) -> Factors:
    """Return A = √(S / s) Vᵀ and B = U √(S / s) of one U (out, k), S (k,) and V (in, k)."""
    U, S, V = triple
    root = (S / scale).sqrt()
    return root[:, None] * V.T, U * root


def chunks(sites: Sequence[Site]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the weights in float32 by stacks (n, out, in) of one shape and rank, with their places.

    A stack holds at most `BYTES`, or one matrix.
    """
    groups = defaultdict(list)
    for place, site in enumerate(sites):
        groups[site.shape, site.r, site.matrix().device].append(place)
    for (shape, *_), places in groups.items():
        size = max(1, BYTES // (4 * shape[0] * shape[1]))
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some, torch.stack([sites[k].matrix().detach().float() for k in some])


def principal(W: Tensor, k: int, generator: torch.Generator | None, passes: int = PASSES) -> Triple:
    """Return U (n, out, k), S (n, k) and V (n, in, k) with W ≈ U S Vᵀ, for float32 W (n, out, in).

    Nothing is drawn, and the result exact, where the random range would be as wide as W.
    """
    n, out, into = W.shape
    width = k + max(LEAST, k // 2)
    if (passes + 1) * width >= min(out, into):
        return exact(W, k)
    seeds = torch.randn(n, into, width, dtype=W.dtype, device="cpu", generator=generator)
    Q = _orthonormal(W @ seeds.to(W.device))
    P = (Q.mT @ W).mT
    for _ in range(passes):
        Y = W @ P[..., -width:]
        for _ in range(2):
            Y = Y - Q @ (Q.mT @ Y)
        new = _orthonormal(Y)
        Q, P = torch.cat((Q, new), -1), torch.cat((P, (new.mT @ W).mT), -1)
    values, Z = _eigen(P.double())
    S, Z = values[..., -k:].flip(-1).clamp(0).sqrt().to(W.dtype), Z[..., -k:].flip(-1).to(W.dtype)
    return Q @ Z, S, P @ Z / S.clamp(torch.finfo(W.dtype).tiny).unsqueeze(-2)


def exact(W: Tensor, k: int) -> Triple:
    """Return the k largest singular values and their vectors from whole decompositions."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[..., :k], S[..., :k], Vh.mT[..., :k]


def minor(W: Tensor, k: int) -> Triple:
    """Return the k smallest of min(out, in) singular values and their vectors, smallest last.

    They come from the eigenvectors of the smaller Gram matrix in float64, which resolves singular
    values down to 1e-8 of the largest, as finely as float32 holds W.
    """
    if W.shape[-2] > W.shape[-1]:
        V, S, U = minor(W.mT, k)
        return U, S, V
    wide = W.double()
    U = torch.linalg.eigh(wide @ wide.mT)[1][..., :k].flip(-1)
    P = wide.mT @ U
    S = torch.linalg.vector_norm(P, dim=-2)
    V = P / S.clamp(torch.finfo(W.dtype).tiny).unsqueeze(-2)
    return U.to(W.dtype), S.to(W.dtype), V.to(W.dtype)


def _orthonormal(Y: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, with zeros in place of what depends on others."""
    wide = Y.double()
    values, vectors = _eigen(wide)
    counts = values > INDEPENDENT * values[..., -1:]
    lengths = torch.where(counts, values.clamp(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return (wide @ (vectors * lengths.unsqueeze(-2))).to(Y.dtype)


def _eigen(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of YᵀY, smallest first, and their vectors."""
    values, vectors = torch.linalg.eigh(Y.mT @ Y)
    return values, vectors
