"""The order in which a recipe goes through its rows."""

from collections.abc import Iterator, Sequence

from deltaw.train.batches import EpochSampler
from deltaw.train.recipe import Recipe


class AsRead(EpochSampler):
    """Every epoch goes through the rows as the data have them."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.lengths)))


def order_of(
    recipe: Recipe, lengths: Sequence[int], *, longest_first: bool = False
) -> EpochSampler:
    """Return what orders rows of these lengths: drawn, similar ones together, or as read."""
    kind = EpochSampler if recipe.shuffle else AsRead
    return kind(
        lengths,
        recipe.batch_size,
        recipe.seed,
        bucketed=recipe.group_by_length,
        longest_first=longest_first,
    )
