"""PiSSA: the principal part of W, which training moves while the rest stays.

    B0 = U_r √(S_r / s),  A0 = √(S_r / s) V_rᵀ,  so that s B0 A0 = U_r S_r V_rᵀ

Source: arXiv 2404.02948, equations 2 and 3; the scale s divides as in PEFT. Two passes of a
randomised SVD find the vectors; `pissa_niter_N` makes N, and `pissa_exact` a whole SVD, as PEFT's
`pissa` does. W is left as it is and s B0 A0 subtracted beside it, where the paper rewrites W: in
float32 both train alike.
"""

from collections.abc import Sequence

from deltaw.inits import Factors, Site, above
from deltaw.inits._svd import PASSES, Triple, exact, principal, split

VARIANTS = ("exact", "niter_N")


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: it has fewer than r singular vectors."""
    return above(site, site.r)


def from_weights(sites: Sequence[Site]) -> list[Factors]:
    """Return A (r, in) and B (out, r) of every site in float32."""
    return [split(_principal(site), site.scale) for site in sites]


def _principal(site: Site) -> Triple:
    W = site.matrix().detach().float()
    if site.variant == "exact":
        return exact(W, site.r)
    passes = int(site.variant.removeprefix("niter_") or PASSES)
    return principal(W, site.r, site.generator, passes)
