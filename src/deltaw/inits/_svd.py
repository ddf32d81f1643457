"""Singular vectors of a matrix: the principal ones by products alone, or by a whole SVD.

Source: arXiv 0909.4061, algorithms 4.1 and 4.3 (a random range and power passes); arXiv 1504.05477,
algorithm 2 (keep the range of every pass, a block Krylov space). Bases lie in rows, as the product
with W from their right is the faster one, and are made orthonormal through the eigenvectors of
their Gram matrix in float64.
"""

import torch
from torch import Tensor

from deltaw.inits import Factors

PASSES = 2
LEAST = 4
"""The least number of random directions beyond those asked for."""
INDEPENDENT = 1e-10
"""How much of its squared length a direction must have outside of the others to count as one."""

Triple = tuple[Tensor, Tensor, Tensor]


def split(triple: Triple, scale: float) -> Factors:
    """Return A = √(S / s) Vᵀ and B = U √(S / s) of one U (out, k), S (k,) and V (in, k)."""
    U, S, V = triple
    root = (S / scale).sqrt()
    return root[:, None] * V.T, U * root


def principal(W: Tensor, k: int, generator: torch.Generator | None, passes: int = PASSES) -> Triple:
    """Return U (out, k), S (k,) and V (in, k) with W ≈ U S Vᵀ, for float32 W (out, in).

    Nothing is drawn, and the result exact, where the random range would be as wide as W.
    """
    out, into = W.shape
    width = k + max(LEAST, k // 4)
    if (passes + 1) * width >= min(out, into):
        return exact(W, k)
    seeds = torch.randn(width, into, dtype=W.dtype, device="cpu", generator=generator)
    Q = _orthonormal(_normal(seeds.to(W.device) @ W.T))
    P = Q @ W
    for _ in range(passes):
        Y = _normal(P[-width:] @ W.T)
        for _ in range(2):
            Y = Y - (Y @ Q.T) @ Q
        new = _orthonormal(Y)
        Q, P = torch.cat((Q, new)), torch.cat((P, new @ W))
    values, Z = _eigen(P.double())
    S, Z = values[-k:].flip(0).clamp(0).sqrt().to(W.dtype), Z[:, -k:].flip(1).to(W.dtype)
    return Q.T @ Z, S, P.T @ Z / S.clamp(torch.finfo(W.dtype).tiny)


def exact(W: Tensor, k: int) -> Triple:
    """Return the k largest singular values and their vectors from whole decompositions."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def minor(W: Tensor, k: int) -> Triple:
    """Return the k smallest of min(out, in) singular values and their vectors, smallest last.

    They come from the eigenvectors of the smaller Gram matrix in float64, which resolves singular
    values down to 1e-8 of the largest, as finely as float32 holds W.
    """
    if W.shape[0] > W.shape[1]:
        V, S, U = minor(W.T, k)
        return U, S, V
    wide = W.double()
    U = _eigen(wide)[1][:, :k].flip(1)
    P = wide.T @ U
    S = torch.linalg.vector_norm(P, dim=0)
    V = P / S.clamp(torch.finfo(W.dtype).tiny)
    return U.to(W.dtype), S.to(W.dtype), V.to(W.dtype)


def _normal(Y: Tensor) -> Tensor:
    """Return the rows at length 1, those of zeros as they are."""
    lengths = torch.linalg.vector_norm(Y, dim=1, keepdim=True, dtype=torch.float64).to(Y.dtype)
    normal: Tensor = Y / lengths.clamp(torch.finfo(Y.dtype).tiny)
    return normal


def _orthonormal(Y: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, with zeros in place of what depends on others.

    What is left of a row of length 1 by the rounding of what was taken off it counts as nothing.
    """
    wide = Y.double()
    values, vectors = _eigen(wide)
    lengths = torch.where(values > INDEPENDENT, values, torch.inf).rsqrt()
    return ((vectors * lengths).T @ wide).to(Y.dtype)


def _eigen(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of Y Yᵀ, smallest first, and their vectors."""
    values, vectors = torch.linalg.eigh(Y @ Y.T)
    return values, vectors
