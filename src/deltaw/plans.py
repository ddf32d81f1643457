"""What an adapter would consist of, as data and as the table a person reads."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.config import LoraConfig
from deltaw.layers.experts import Experts
from deltaw.summarizing import shorten


@dataclass(frozen=True)
class Target:
    """One module that gets a low-rank ΔW; `shapes` holds (out, in) of each slot.

    Of parameters adapted on their own each is one, `stack` matrices along its leading axis.
    """

    path: str
    kind: str
    slots: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    r: int
    alpha: float
    scale: float
    enabled: tuple[bool, ...]
    parameters: int
    stack: int = 0

    @property
    def name(self) -> str:
        """Return the path of the module, or of the parameter."""
        return f"{self.path}.{self.slots[0]}" if self.kind == Experts.kind else self.path


@dataclass(frozen=True)
class Trained:
    """One module of which parameters (and, in a head, buffers) are trained as full copies."""

    path: str
    names: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Tokens:
    """One table of embeddings of which the rows of some tokens are trained."""

    path: str
    ids: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What an adapter consists of; `str(plan)` is the table a person reads."""

    config: LoraConfig
    targets: tuple[Target, ...]
    trained: tuple[Trained, ...]
    warnings: tuple[str, ...]
    tokens: tuple[Tokens, ...] = ()

    @property
    def parameters(self) -> int:
        """Return how many numbers are trained."""
        parts: list[Target | Trained | Tokens] = [*self.targets, *self.trained, *self.tokens]
        return sum(part.parameters for part in parts)

    def __str__(self) -> str:
        lines = [
            f"{shorten([t.name for t in group]):<58} {group[0].kind:<10}{_shape(group[0]):<16}"
            f"r={group[0].r:<4} alpha={group[0].alpha:<6g}"
            f"{sum(t.parameters for t in group):>12,}"
            for group in _grouped(self.targets)
        ]
        lines += [
            f"{row.path:<58} {'in full':<10}{', '.join(row.names):<33}{row.parameters:>12,}"
            for row in self.trained
        ]
        lines += [
            f"{row.path:<58} {'rows':<10}{f'{len(row.ids)} tokens':<33}{row.parameters:>12,}"
            for row in self.tokens
        ]
        kinds = Counter(target.kind for target in self.targets)
        total = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no"
        lines.append(f"{total} layers, {self.parameters:,} trainable parameters")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _grouped(targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets that differ in the numbers of their paths alone, group by group."""
    groups: dict[object, list[Target]] = {}
    for t in targets:
        key = (re.sub(r"\d+", "*", t.name), t.kind, t.shapes, t.r, t.alpha)
        groups.setdefault(key, []).append(t)
    return list(groups.values())


def _shape(target: Target) -> str:
    out, into = target.shapes[0]
    times = target.stack or len(target.slots)
    count = f" x{times}" if times > 1 else ""
    return f"{out}x{into}{count}"
