"""The norms of the rows of W + s B A, without forming B A.

    ‖W + s B A‖² = ‖W‖² + 2 s Σ_r (W Aᵀ ∘ B) + s² Σ_r (B A Aᵀ ∘ B)        row by row

One pass over W and two thin products, instead of an (out, in) tensor.
"""

import torch
from torch import Tensor


@torch.no_grad()
def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norm of every row (out,), in float32 or wider; no gradient flows.

    Args:
        W: (out, in), in any dtype; the product with A is in it.
        A: (r, in).
        B: (out, r).
        scale: s.
    """
    wide = torch.promote_types(torch.float32, W.dtype)
    A, B = A.to(wide), B.to(wide) * scale
    squared = torch.linalg.vector_norm(W, dim=1, dtype=wide).square()
    squared += 2 * ((W @ A.to(W.dtype).t()).to(wide) * B).sum(1)
    squared += ((B @ (A @ A.t())) * B).sum(1)
    norms: Tensor = squared.clamp_(min=0).sqrt_()
    return norms
