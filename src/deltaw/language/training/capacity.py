"""Whether an adapter can hold what the answers say and the base does not know."""

import math
from dataclasses import dataclass

BITS = 2
"""Bits that a parameter holds when it is all that is trained."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """`learnt` tokens at `loss` nats each, and the `parameters` of an adapter of rank `r`.

    The base lacks `learnt · loss / ln 2` bits of the answers, at its loss before training; the
    adapter has room for 2 bits in each parameter. Where the first exceeds the second a higher rank
    learns more.

    Source: Thinking Machines, "LoRA Without Regret", 2025; 2 bits: arXiv 2404.05405.
    """

    learnt: int
    loss: float
    parameters: int
    r: int

    @property
    def needed(self) -> float:
        """Bits of the answers that the base does not know."""
        return self.learnt * self.loss / math.log(2)

    @property
    def room(self) -> int:
        """Bits that the adapter can hold."""
        return BITS * self.parameters

    @property
    def enough(self) -> bool:
        """Whether the adapter has room for the answers."""
        return self.needed <= self.room

    @property
    def rank(self) -> int:
        """The least power of two as rank with enough room."""
        return int(2 ** math.ceil(math.log2(self.r * self.needed / self.room)))

    def __str__(self) -> str:
        return (
            f"the answers hold {shown(self.needed)} that the model does not know, the adapter has "
            f"room for {shown(self.room)}"
        )


def shown(bits: float) -> str:
    """Return `640 bits`, `21.3 kbit`, `90.9 Mbit`."""
    if bits < 1000:
        return f"{bits:.0f} bits"
    return f"{bits / 1e3:.1f} kbit" if bits < 1e6 else f"{bits / 1e6:.1f} Mbit"
