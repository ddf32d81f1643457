"""A from N(0, 1/r²), that is with standard deviation 1/r as PEFT's `"gaussian"` has it; B zero."""

import torch
from torch import Tensor

from deltaw.inits import Site


def start(site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) in float32."""
    rows, columns = site.shape
    if site.zero == "A":
        B = torch.empty(rows, site.r).normal_(generator=site.generator)
        return torch.zeros(site.r, columns), B
    A = torch.empty(site.r, columns).normal_(std=1 / site.r, generator=site.generator)
    return A, torch.zeros(rows, site.r)
