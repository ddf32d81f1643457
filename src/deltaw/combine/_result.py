"""What a reduction returns: the new adapter, and what it kept of every ΔW."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deltaw.combine._deltas import Key, Product
from deltaw.combine._spectrum import Limit, Spectrum
from deltaw.state import State


class Kept(NamedTuple):
    """What one layer, or one slice `path[slot]` of it, kept.

    `energy` is the share of Σσ² and `error` ‖ΔW' - ΔW‖/‖ΔW‖, so that error² = 1 - energy.
    """

    path: str
    rank: int
    energy: float
    error: float


@dataclass(frozen=True)
class Reduced:
    """An adapter, and what its layers kept, in the order of their paths."""

    state: State
    kept: tuple[Kept, ...]


def cut(
    path: str, spectra: Mapping[Key, Spectrum], limit: Limit, *, together: bool = True
) -> tuple[dict[Key, Product], list[Kept]]:
    """Return the products that are left of a layer within `limit`, and what each slot kept.

    The products of a slot, such as groups of a convolution, share the rank equally if they go
    `together`, as they do in PEFT; each has all of it otherwise.
    """
    parts: dict[Key, Product] = {}
    report = []
    for slot in dict.fromkeys(slot for slot, _ in spectra):
        own = {key: spectrum for key, spectrum in spectra.items() if key[0] == slot}
        share = limit.shared(len(own)) if together else limit
        ranks = {key: share.of(spectrum) or len(spectrum.S) for key, spectrum in own.items()}
        parts |= {key: spectrum.cut(ranks[key]) for key, spectrum in own.items()}
        total = sum(spectrum.total for spectrum in own.values())
        lost = sum(spectrum.lost(ranks[key]) for key, spectrum in own.items())
        part = lost / total if total else 0.0
        name = path if slot == "weight" else f"{path}[{slot}]"
        rank = sum(ranks.values()) if together else max(ranks.values())
        report.append(Kept(name, rank, 1 - part, math.sqrt(part)))
    return parts, report
