"""A and B both random: a start whose ΔW is not zero, for tests (`init_lora_weights=False`)."""

from torch import Tensor

from deltaw.inits import Site, empty


def start(site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in) from U(±1/sqrt(in)) and B (out, r) from U(±1/sqrt(r)), in float32."""
    rows, columns = site.shape

    def uniform(*shape: int) -> Tensor:
        bound = shape[1] ** -0.5
        return empty(*shape).uniform_(-bound, bound, generator=site.generator)

    return uniform(site.r, columns), uniform(rows, site.r)
