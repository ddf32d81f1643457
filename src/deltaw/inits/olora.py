"""OLoRA: the first r columns of Q and rows of R, where W = Q R.

    B0 = Q[:, :r],  A0 = R[:r] = B0ᵀ W

Source: arXiv 2406.01775, section 3. W is left as it is and s B0 A0 subtracted beside it, where the
paper rewrites W. The first r columns of W alone determine B0, so no whole decomposition is made.
"""

import torch
from torch import Tensor

from deltaw.inits import Site


def start(site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) in float32."""
    W = site.matrix().detach().float()
    B, _ = torch.linalg.qr(W[:, : site.r])
    return B.T @ W, B
