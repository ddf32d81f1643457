"""LoRA-GA: the first steps move W as full fine-tuning would, along its gradient G = U S Vᵀ.

    A0 = c V[:, :r]ᵀ,  B0 = c U[:, r:2r],  c = out^(1/4) / √16

Source: arXiv 2407.05000, section 3, and the "stable" scale of its authors' code. PEFT
multiplies B0 by c S[r:2r] and leaves A0 without c, so that there the start depends on the size of
the loss. G is summed over the batches by its largest 4 r directions, one layer at a time; no
gradient outlives its layer's turn. W is left as it is and s B0 A0 subtracted beside it, where the
paper rewrites W.
"""

from collections.abc import Sequence

from torch import Tensor

from deltaw.errors import ConfigError, raise_all
from deltaw.inits import Factors, Run, Site, above
from deltaw.inits._svd import Triple, principal

GAMMA = 16


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: a gradient has fewer than 2 r singular vectors."""
    return above(site, 2 * site.r)


def from_gradients(sites: Sequence[Site], run: Run) -> list[Factors]:
    """Return A (r, in) and B (out, r) of every site in float32.

    Raises:
        ConfigError: listing the layers that get no gradient on the data.
    """
    by_name = {site.name: site for site in sites}
    found: dict[str, Triple] = {}

    def see(name: str, G: Tensor) -> None:
        site = by_name[name]
        G = G.float()
        if name in found:
            U, S, V = found[name]
            G = G + (U * S) @ V.T
        found[name] = principal(G, min(4 * site.r, *site.shape), site.generator)

    run(see)
    raise_all(
        ConfigError,
        "These layers get no gradient on the data:",
        [site.name for site in sites if site.name not in found or not found[site.name][1].any()],
        "leave them out of target_modules, or give data and a loss that depend on them.",
    )
    return [_along(found[site.name], site) for site in sites]


def _along(gradient: Triple, site: Site) -> Factors:
    U, _, V = gradient
    c = site.shape[0] ** 0.25 / GAMMA**0.5
    return c * V[:, : site.r].T, c * U[:, site.r : 2 * site.r]
