"""Which tokens a model's own generation settings stop at."""

from types import SimpleNamespace

import pytest

from deltaw.train.stopping import stop_at


@pytest.mark.parametrize(
    ("known", "added", "after"),
    [(None, [7, 9], [7, 9]), (7, [9], [7, 9]), ([2, 7], [9], [2, 7, 9]), ([9, 7], [], [9, 7])],
)
def test_what_is_not_known_is_added(
    known: int | list[int] | None, added: list[int], after: list[int]
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
    assert stop_at(model, [7, 9, 9]) == added
    assert model.generation_config.eos_token_id == after


def test_a_model_that_cannot_generate_has_none() -> None:
    assert stop_at(SimpleNamespace(generation_config=None), [7]) == []
