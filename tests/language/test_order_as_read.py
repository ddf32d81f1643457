"""`shuffle: false` trains on the rows as the data have them."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.models import conversations, write_json

from deltaw.language.choosing import train
from deltaw.language.encoding.batches import Padding
from deltaw.train.order import order_of
from deltaw.train.recipe import parse

LENGTHS = [3, 9, 4, 4, 8, 1, 7]


def test_every_epoch_is_as_read() -> None:
    values = {"model": "m", "data": "d", "batch_size": 2}
    order = order_of(parse(values | {"shuffle": False}), LENGTHS, longest_first=True)
    drawn = order_of(parse(values), LENGTHS)
    for epoch in range(3):
        order.set_epoch(epoch)
        drawn.set_epoch(epoch)
        assert list(order) == list(range(7))
        assert list(drawn) != list(range(7))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_reads_rows_in_this_order(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool
) -> None:
    seen: list[list[int]] = []
    real = Padding.__call__

    def spied(self: Padding, rows: Any) -> Any:
        seen.extend(list(row["input_ids"]) for row in rows)
        return real(self, rows)

    write_json(tmp_path / "train.json", conversations(16))
    run = {
        "model": str(talker / "model"),
        "data": str(tmp_path / "train.json"),
        "output": str(tmp_path / "run"),
        "validation_share": 0,
        "epochs": 1,
        "batch_size": 4,
        "samples": 0,
        "shuffle": shuffle,
    }
    recipe = parse(run)
    with monkeypatch.context() as patched:
        patched.setattr(Padding, "__call__", spied)
        train(recipe)
    whole = read_in_order(recipe)
    assert len(whole) == 16
    found = any(seen[at : at + 16] == whole for at in range(len(seen)))
    assert found is not shuffle


def read_in_order(recipe: Any) -> list[list[int]]:
    """The tokens of all rows, as the data have them."""
    from deltaw.language.training.opening import begin
    from deltaw.train.console import Console

    opening = begin(recipe, Console(silent=True), ("loss",))
    return [list(row.input_ids) for row in opening.encoder.encode(opening.corpus.train).rows]
