"""OLoRA: the first r columns of Q and rows of R, where W = Q R.

    B0 = Q[:, :r],  A0 = R[:r] = B0ᵀ W

Source: arXiv 2406.01775, section 3. W is left as it is and s B0 A0 subtracted beside it, where the
paper rewrites W. The first r columns of W alone determine B0, so no whole decomposition is made.
"""

from collections.abc import Sequence

import torch

from deltaw.inits import Factors, Site, above


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: Q has fewer than r columns."""
    return above(site, site.r)


def from_weights(sites: Sequence[Site]) -> list[Factors]:
    """Return A (r, in) and B (out, r) of every site in float32."""
    return [_first(site) for site in sites]


def _first(site: Site) -> Factors:
    W = site.matrix().detach().float()
    B, _ = torch.linalg.qr(W[:, : site.r])
    return B.T @ W, B
