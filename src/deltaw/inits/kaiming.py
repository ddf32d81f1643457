"""A Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)); B zero.

PEFT's and loralib's default. Where A is the zero factor (embeddings) B is drawn from N(0, 1).
"""

from torch import Tensor

from deltaw.inits import Site, empty


def start(site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) in float32."""
    rows, columns = site.shape
    if site.zero == "A":
        B = empty(rows, site.r).normal_(generator=site.generator)
        return empty(site.r, columns).zero_(), B
    bound = columns**-0.5
    A = empty(site.r, columns).uniform_(-bound, bound, generator=site.generator)
    return A, empty(rows, site.r).zero_()
