"""The leading singular vectors of a gradient, exactly or from a random sketch."""

import torch
from torch import Tensor

from deltaw.errors import StateError

OVERSAMPLING = 10
POWER_PASSES = 2
SIDES = ("std", "reverse_std", "left", "right")


def is_left(shape: torch.Size, proj_type: str) -> bool:
    """Tell whether G (m, n) is projected to PᵀG (r, n), and not to GP (m, r).

    `"std"` keeps the longer side, so that projector and projected gradient are smallest together.
    """
    rows, columns = shape
    if proj_type in ("left", "right"):
        return proj_type == "left"
    return (rows < columns) == (proj_type == "std")


def basis(G: Tensor, rank: int, *, left: bool, exact: bool, seed: int) -> Tensor:
    """Return P, the first `rank` left (m, r) or right (n, r) singular vectors of G as columns.

    Computed in float32 at least and returned in the dtype of G. A random sketch is drawn from
    `seed` alone, so that the same step of a resumed run has the same P.

    Source: arXiv 0909.4061, algorithms 4.4 (power passes) and 5.1.

    Raises:
        StateError: if G holds NaN or Inf.
    """
    if not G.isfinite().all():
        raise StateError(
            f"The gradient of a weight {tuple(G.shape)} holds NaN or Inf, which has no singular "
            "vectors; the weight was left as it was.\nFix: use a smaller learning rate, or warm up."
        )
    wide = G.to(torch.promote_types(torch.float32, G.dtype))
    P: Tensor
    if exact or rank + OVERSAMPLING >= min(G.shape):
        U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
        P = U[:, :rank] if left else Vh[:rank].T
    else:
        P = _sketched(wide if left else wide.T, rank, seed)
    return P.to(G.dtype).contiguous()


def _sketched(M: Tensor, rank: int, seed: int) -> Tensor:
    """Return about the first `rank` left singular vectors of M."""
    generator = torch.Generator(M.device).manual_seed(seed)
    size = M.shape[1], rank + OVERSAMPLING
    Q = M @ torch.randn(size, generator=generator, device=M.device, dtype=M.dtype)
    for _ in range(POWER_PASSES):
        Q = M @ torch.linalg.qr(M.T @ torch.linalg.qr(Q).Q).Q
    Q = torch.linalg.qr(Q).Q
    found: Tensor = Q @ torch.linalg.svd(Q.T @ M, full_matrices=False).U[:, :rank]
    return found
