"""A from N(0, 1/r²), that is with standard deviation 1/r as PEFT's `"gaussian"` has it; B zero."""

from torch import Tensor

from deltaw.inits import Site, empty


def start(site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) in float32."""
    rows, columns = site.shape
    if site.zero == "A":
        B = empty(rows, site.r).normal_(generator=site.generator)
        return empty(site.r, columns).zero_(), B
    A = empty(site.r, columns).normal_(std=1 / site.r, generator=site.generator)
    return A, empty(rows, site.r).zero_()
