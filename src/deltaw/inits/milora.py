"""MiLoRA: the minor part of W, so that training leaves the principal part alone.

    B0 = U_m √(S_m / s),  A0 = √(S_m / s) V_mᵀ

with the r smallest singular values of W.

Source: arXiv 2406.09044, section 3; the scale s divides so that s B0 A0 is the minor part itself.
W is left as it is and s B0 A0 subtracted beside it, where the paper rewrites W.
"""

from collections.abc import Sequence

from deltaw.inits import Factors, Site, above
from deltaw.inits._svd import minor, split


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: it has fewer than r singular vectors."""
    return above(site, site.r)


def from_weights(sites: Sequence[Site]) -> list[Factors]:
    """Return A (r, in) and B (out, r) of every site in float32."""
    return [split(minor(site.matrix().detach().float(), site.r), site.scale) for site in sites]
