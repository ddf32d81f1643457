"""A and B random with A's rows and B's columns in orthogonal halves of the rank's space.

    A0 = Q_oddᵀ G_A / 10,  B0 = G_B Q_even / 10,  so that B0 A0 = 0 but for rounding

with the odd and even rows of an orthogonal matrix Q (r, r), and G_A (r/2, in), G_B (out, r/2) from
N(0, 1).

Source: https://datta0.github.io/posts/rethink-lora-init; PEFT's `"orthogonal"`. What rounding
leaves of B0 A0 is subtracted, as of every start.
"""

import torch

from deltaw.inits import Factors, Site, empty


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: an odd rank has no halves."""
    return f"its rank of {site.r} is odd" if site.r % 2 else ""


def start(site: Site) -> Factors:
    """Return A (r, in) and B (out, r) in float32."""
    rows, columns = site.shape
    half = site.r // 2

    def normal(*shape: int) -> torch.Tensor:
        return empty(*shape).normal_(generator=site.generator)

    Q, _ = torch.linalg.qr(normal(site.r, site.r))
    return Q[0::2].T @ normal(half, columns) / 10, normal(rows, half) @ Q[1::2] / 10
