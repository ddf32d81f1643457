"""The examples that a recipe names."""

from deltaw.train.data.dataset import Data, build
from deltaw.train.data.detect import detect
from deltaw.train.data.table import read_data
from deltaw.train.recipe import Recipe


def read(recipe: Recipe) -> Data:
    """Return the examples of the recipe's data."""
    splits = read_data(recipe.data, encoding=recipe.encoding)
    schema = detect(splits.train, recipe.text, recipe.label, recipe.task)
    return build(
        splits,
        schema,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        validation_share=recipe.validation_share,
        test_share=recipe.test_share,
        allow_leakage=recipe.allow_leakage,
        max_train_rows=recipe.max_train_rows,
    )
