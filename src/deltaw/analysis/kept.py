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
    ranks, energies = [each.rank for each in kept], [each.energy for each in kept]
    lines.append(
        f"{len(kept)} layers keep {min(energies):.2%} to {max(energies):.2%} of Σσ² "
        f"at rank {min(ranks)} to {max(ranks)}; error is ‖ΔW' - ΔW‖/‖ΔW‖"
    )
    return "\n".join(lines)
