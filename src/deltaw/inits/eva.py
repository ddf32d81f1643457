"""EVA: A spans what varies most in the layer's inputs, and layers share the ranks by it; B zero.

    A0 = V_rᵀ,  X - mean = U S Vᵀ

for all inputs X (rows, in) of some data. Of all layers' shares S_j² / Σ S² of their variance the
largest win as many ranks as the layers have together, each layer at most rho r; one that wins none
is left out. The scale s stays.

Source: arXiv 2410.07170, section 3; the SVD is brought up to date batch by batch as
in Ross et al. 2008, keeping twice the directions that a layer may get. rho is 2, or N as in
`eva_rho_1`, which leaves the ranks as they are. The data are read once, where PEFT reads them again
until the vectors settle. What a mask of the batch hides, or a label of -100, is left out as in
PEFT. The inputs of an embedding are no numbers to decompose: it starts as usual.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import ConfigError, raise_all
from deltaw.inits import Factors, Run, Site, empty, kaiming
from deltaw.inits._svd import principal

VARIANTS = ("rho_N",)
RHO = 2


def refusal(site: Site) -> str:
    """Return why the slot cannot start so: inputs have fewer than r directions, or rho is 0."""
    if not _most(site):
        return "a rho of 0 leaves it no rank"
    _, into = site.shape
    measured = site.zero != "A"
    return f"its rank of {site.r} is above in = {into}" if measured and site.r > into else ""


def from_inputs(sites: Sequence[Site], run: Run) -> list[Factors]:
    """Return A (ranks, in) and B (out, ranks) of every site in float32; ranks of 0 leave it out.

    Raises:
        ConfigError: listing the layers of which too few inputs were seen.
    """
    measured = {site.layer: site for site in sites if site.zero != "A"}
    seen: dict[str, Inputs] = {}

    def see(layer: str, X: Tensor) -> None:
        site = measured[layer]
        most = min(_most(site), site.shape[1])
        seen[layer] = seen.get(layer, NONE).joined(X.float(), 2 * most, site.generator)

    run(see)
    raise_all(
        ConfigError,
        "EVA saw too little of these layers to start them:",
        [
            f"{layer}: {seen.get(layer, NONE).count} rows of inputs for a rank of {site.r}"
            for layer, site in measured.items()
            if seen.get(layer, NONE).count <= site.r
        ],
        "give more data, or leave out layers that do not run on it.",
    )
    ranks = _shared({layer: (seen[layer], site) for layer, site in measured.items()})
    return [
        kaiming.start(site)
        if site.layer not in measured
        else (seen[site.layer].vectors(ranks[site.layer]), empty(site.shape[0], r).zero_())
        for site in sites
        for r in [ranks.get(site.layer, 0)]
    ]


@dataclass(frozen=True)
class Inputs:
    """The largest directions S Vᵀ of all rows so far, their count and mean, and the whole Σ S²."""

    count: int
    mean: Tensor
    rows: Tensor
    total: float

    def joined(self, X: Tensor, keep: int, generator: torch.Generator | None) -> "Inputs":
        """Return these with further rows X, by at most `keep` directions."""
        if not len(X):
            return self
        count, mean = self.count + len(X), X.mean(0)
        own, before = X - mean, self.mean.to(X.device).expand_as(mean)
        between = (mean - before) * (self.count * len(X) / count) ** 0.5
        stack = torch.cat((self.rows.to(X.device).reshape(-1, X.shape[1]), own, between[None]))
        k = min(keep, *stack.shape)
        _, S, V = principal(stack, k, generator)
        total = self.total + float(own.square().sum() + between.square().sum())
        return Inputs(count, torch.lerp(before, mean, len(X) / count), S[:, None] * V.T, total)

    def shares(self) -> Tensor:
        """Return of every direction its share of the variance, largest first."""
        return (self.rows.square().sum(1) / max(self.total, 1e-30)).cpu()

    def vectors(self, r: int) -> Tensor:
        """Return the first r directions as rows of length 1."""
        return torch.nn.functional.normalize(self.rows[:r])


NONE = Inputs(0, torch.zeros(()), torch.zeros(0), 0.0)


def _most(site: Site) -> int:
    return site.r * int(site.variant.removeprefix("rho_") or RHO)


def _shared(layers: Mapping[str, tuple[Inputs, Site]]) -> dict[str, int]:
    """Return the rank of every layer: as many of the largest shares as there are ranks."""
    found = [
        (float(share), layer)
        for layer, (inputs, site) in layers.items()
        for share in inputs.shares()[: _most(site)]
        if share > 0
    ]
    found.sort(key=lambda pair: -pair[0])
    ranks = dict.fromkeys(layers, 0)
    for _, layer in found[: sum(site.r for _, site in layers.values())]:
        ranks[layer] += 1
    return ranks
