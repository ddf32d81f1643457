"""What the options of the command line mean."""

import pytest

from deltaw.cli.options import targets
from deltaw.cli.train import recipe_values
from deltaw.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ([], None),
        (["all-linear"], "all-linear"),
        (["query,value"], ["query", "value"]),
        (["query", "value"], ["query", "value"]),
        (["layer.0.attention.self.query"], ["layer.0.attention.self.query"]),
        (["layer.0.query,h.1.c-attn"], ["layer.0.query", "h.1.c-attn"]),
        ([r".*\.(query|value)"], r".*\.(query|value)"),
        (["layer.[01].query"], "layer.[01].query"),
    ],
)
def test_targets_are_names_or_one_pattern(values: list[str], meant: str | list[str] | None) -> None:
    assert targets(values) == meant


@pytest.mark.parametrize(
    ("rest", "options", "key"),
    [
        (["a.csv", "data=b.csv"], {}, "data: 'a.csv' and 'b.csv'"),
        (["a.csv", "model=other"], {}, "model: 'm' and 'other'"),
        (["a.csv", "learning_rate=1e-4"], {"learning_rate": 1e-3}, "learning_rate: 0.0001 and"),
        (["a.csv", "r=4", "seed=1"], {"r": 4, "seed": 2}, "seed: 1 and 2"),
    ],
)
def test_a_key_that_is_given_twice_is_an_error(
    rest: list[str], options: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match="Given twice") as caught:
        recipe_values("m", rest, options)
    assert key in str(caught.value)
