"""How large the largest batches are that a recipe trains on and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deltaw.language import scores
from deltaw.train.data.wording import counted
from deltaw.train.order import order_of
from deltaw.train.recipe import Recipe

EVALUATED = 32
"""Labelled texts that are scored at once, or the recipe's batch if that is larger."""

Sides = tuple[int, int]
"""The tokens of a row that are read, and those of an answer that is apart from them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The rows of a batch, their longest, and the longest of answers that are apart."""

    rows: int
    tokens: int
    answers: int = 0

    @property
    def length(self) -> int:
        """How many tokens a row has, padding included."""
        return self.tokens + self.answers

    @property
    def size(self) -> int:
        """How many tokens all rows have."""
        return self.rows * self.length

    def __str__(self) -> str:
        apart = f", and {counted(self.answers, 'token')} of the answer" if self.answers else ""
        return f"{counted(self.rows, 'row')} of {counted(self.tokens, 'token')}{apart}"

    def cut(self, tokens: int) -> "Shape":
        """Return it with no more tokens on either side."""
        return Shape(self.rows, min(self.tokens, tokens), min(self.answers, tokens))

    def shared_by(self, processes: int) -> "Shape":
        """Return the largest share of so many processes."""
        return replace(self, rows=-(-self.rows // processes))


@dataclass(frozen=True, slots=True)
class Batches:
    """The largest batch that is trained on, and those that are scored while training and before."""

    trained: Shape
    scored: Shape | None = None
    known: Shape | None = None


def of_answers(
    recipe: Recipe,
    trained: Sequence[Sides],
    scored: Sequence[Sides],
    known: Sequence[Sides],
    vocabulary: int,
) -> Batches:
    """Return the largest batches of rows of a language model; `known` is scored before training."""

    room = scores.room(torch.cuda.is_available())

    def largest(rows: Sequence[Sides]) -> Shape | None:
        cut = scores.batches([max(sides) for sides in rows], vocabulary, room)
        return _largest([[rows[index] for index in part] for part in cut]) if cut else None

    return Batches(_trained(recipe, trained, longest_first=True), largest(scored), largest(known))


def of_texts(recipe: Recipe, trained: Sequence[int], scored: Sequence[int]) -> Batches:
    """Return the largest batches of labelled texts."""
    rows = min(len(scored), max(EVALUATED, recipe.batch_size))
    held = Shape(rows, max(scored)) if scored else None
    return Batches(_trained(recipe, [(size, 0) for size in trained], longest_first=False), held)


def _trained(recipe: Recipe, rows: Sequence[Sides], *, longest_first: bool) -> Shape:
    size = recipe.batch_size
    order = order_of(recipe, [sum(sides) for sides in rows], longest_first=longest_first)
    ordered = [rows[index] for index in order]
    return _largest([ordered[at : at + size] for at in range(0, len(ordered), size)])


def _largest(parts: Sequence[Sequence[Sides]]) -> Shape:
    """Return the batch of the most tokens; where answers are apart, with the longest of all."""
    shapes = [Shape(len(part), *map(max, zip(*part, strict=True))) for part in parts]
    largest = max(shapes, key=lambda shape: shape.size)
    if not largest.answers:
        return largest
    return Shape(
        max(shape.rows for shape in shapes),
        max(shape.tokens for shape in shapes),
        max(shape.answers for shape in shapes),
    )
