"""What a reduction kept of every layer, as a person reads it."""

from collections.abc import Sequence

from deltaw.analysis.inspect import in_order
from deltaw.combine import Kept


def text(kept: Sequence[Kept]) -> str:
    """Return a table of ranks, energies and errors; paths are shown as given."""
    if not kept:
        return "no layer has a low-rank ΔW"
    width = max(len("layer"), *(len(each.path) for each in kept))
    lines = [f"{'layer':<{width}}  rank  energy   error"]
    lines += [
        f"{each.path:<{width}}  {each.rank:>4}  {each.energy:>6.2%}  {each.error:>6.2%}".rstrip()
        for each in sorted(kept, key=lambda each: in_order(each.path))
    ]
    energies = _span([f"{e:.2%}" for e in sorted(each.energy for each in kept)])
    ranks = _span([str(r) for r in sorted(each.rank for each in kept)])
    layers = f"{len(kept)} layers keep" if len(kept) > 1 else "1 layer keeps"
    lines.append(f"{layers} {energies} of Σσ² at rank {ranks}; error is ‖ΔW' - ΔW‖/‖ΔW‖")
    return "\n".join(lines)


def _span(ascending: Sequence[str]) -> str:
    first, last = ascending[0], ascending[-1]
    return first if first == last else f"{first} to {last}"
