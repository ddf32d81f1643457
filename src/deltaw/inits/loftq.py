"""LoftQ: B0 A0 makes up for what packing W loses, as far as rank r can.

    Q = q(W - s B A),  W - Q = U S Vᵀ,  B = U_r √(S_r / s),  A = √(S_r / s) V_rᵀ

from B A = 0 and N times over; q packs and unpacks. `loftq_iter_N` makes N, which is 1 without it.

Source: arXiv 2310.08659, algorithm 1; the scale s divides, where PEFT leaves it to the user.
`absorb` packs W - s B0 A0 at the end, so that Q goes with the last factors and not with those of
the turn before: half a turn more, so that what is saved starts at the output of the base as it
was. ‖W - Q - s B0 A0‖ is smaller still for it at ranks far below the width of W, and may be some
percent larger from an eighth of it on. Two passes of a randomised SVD find the vectors.
"""

from collections.abc import Sequence

import torch

from deltaw.inits import Factors, Site, above
from deltaw.inits._svd import PASSES, Triple, principal, split

VARIANTS = ("iter_N",)


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: too few singular vectors, no turns, or a part of W."""
    if not _turns(site):
        return "a number of iterations of 0 leaves it no start"
    if site.name != site.layer:
        return "a slice of a fused weight is not packed on its own"
    return above(site, site.r)


def from_packed(sites: Sequence[Site]) -> list[Factors]:
    """Return A (r, in) and B (out, r) of every site in float32."""
    return [split(_turned(site), site.scale) for site in sites]


def _turned(site: Site) -> Triple:
    W = site.matrix().detach().float()
    low = torch.zeros_like(W)
    for _ in range(_turns(site)):
        U, S, V = principal(W - site.packed(W - low), site.r, site.generator, PASSES + 1)
        low = U * S @ V.T
    return U, S, V


def _turns(site: Site) -> int:
    return int(site.variant.removeprefix("iter_") or 1)
