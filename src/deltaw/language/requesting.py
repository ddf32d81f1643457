"""Which data a recipe asks for."""

from pathlib import Path

from deltaw.language.data.corpus import Request
from deltaw.train.recipe import Recipe


def request(recipe: Recipe) -> Request:
    """Return which data the recipe asks for."""
    return Request(
        dataset=recipe.data,
        eval_dataset=recipe.eval_data,
        dataset_dir=None if recipe.dataset_dir is None else Path(recipe.dataset_dir),
        columns=recipe.columns,
        tags=recipe.tags,
        mix_strategy=recipe.mix_strategy,
        interleave_probs=recipe.interleave_probs,
        max_samples=recipe.max_samples,
        val_size=recipe.validation_share,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        skip_bad_rows=recipe.skip_bad_rows,
        allow_leakage=recipe.allow_leakage,
        encoding=recipe.encoding,
    )
