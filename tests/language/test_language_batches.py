"""Padding and packing: every token once, and documents that share a row do not see each other."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.language.models import make_model
from torch import nn
from transformers import AutoModelForCausalLM

from deltaw.errors import ConfigError, DivergedError
from deltaw.language.data.samples import Passage
from deltaw.language.encoding.batches import Padding, as_data, packed, require_apart
from deltaw.language.encoding.encoder import Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.scores import measured, score

SAMPLE = Passage("x", "f", 1)


def row(length: int, start: int = 5) -> Row:
    ids = [start + n % 50 for n in range(length)]
    return Row(ids, [MASKED, *ids[1:]], SAMPLE)


def items(columns: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_every_document_is_packed_once_and_whole(lengths: list[int]) -> None:
    rows = [row(length, start=5 + n) for n, length in enumerate(lengths)]
    columns = packed(rows, 30)
    found = []
    for item in items(columns):
        assert len(item["input_ids"]) == len(item["labels"]) == len(item["position_ids"]) <= 30
        begins = [n for n, place in enumerate(item["position_ids"]) if place == 0]
        for start, end in zip(begins, [*begins[1:], len(item["input_ids"])], strict=True):
            assert item["position_ids"][start:end] == list(range(end - start))
            found.append((tuple(item["input_ids"][start:end]), tuple(item["labels"][start:end])))
    assert sorted(found) == sorted((tuple(r.input_ids), tuple(r.labels)) for r in rows)
    assert len(columns["input_ids"]) <= 2 * -(-sum(lengths) // 30)


def test_the_best_fit_leaves_no_room() -> None:
    columns = packed([row(n) for n in (7, 3, 6, 4, 5, 5)], 10)
    assert [len(ids) for ids in columns["input_ids"]] == [10, 10, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = make_model(tmp_path_factory.mktemp("batches"))
    return AutoModelForCausalLM.from_pretrained(folder)


def test_logits_and_loss_are_those_of_each_document_alone(model: nn.Module) -> None:
    rows = [row(n, start=5 + n) for n in (9, 4, 12, 6, 11, 3)]
    padding = Padding(0)
    apart = padding(items(as_data(rows)))
    together = padding(items(packed(rows, 20)))
    assert "attention_mask" in apart and "attention_mask" not in together
    model.eval()
    with torch.no_grad():
        alone = {tuple(r.input_ids): model(torch.tensor([r.input_ids])).logits[0] for r in rows}
        places = together["position_ids"]
        logits = model(together["input_ids"], position_ids=places, use_cache=False).logits
        losses = [
            float(model(**batch, use_cache=False, num_items_in_batch=1).loss)
            for batch in (apart, together)
        ]
    for item, out in zip(items(packed(rows, 20)), logits, strict=True):
        begins = [n for n, place in enumerate(item["position_ids"]) if place == 0]
        for start, end in zip(begins, [*begins[1:], len(item["input_ids"])], strict=True):
            expected = alone[tuple(item["input_ids"][start:end])]
            torch.testing.assert_close(out[start:end], expected, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Mixing(nn.Module):
    """A model that takes no notice of positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, position_ids: Any = None, use_cache: bool = True) -> Any:
        return self.inner(ids, use_cache=use_cache)


def test_a_model_whose_documents_would_see_each_other_is_refused(model: nn.Module) -> None:
    rows = [row(12), row(9, start=30)]
    require_apart(model, rows)
    with pytest.raises(ConfigError, match="Mixing lets documents that share a row see each other"):
        require_apart(Mixing(model), rows)


def test_scores_are_those_of_a_plain_loop(model: nn.Module) -> None:
    rows = [row(n, start=5 + n) for n in (9, 4, 12, 6, 11, 3)]
    rows[2] = Row(rows[2].input_ids, [MASKED] * 6 + rows[2].labels[6:], SAMPLE)
    found = measured(model, rows, Padding(0))
    wide = model.double().eval()
    total = count = right = 0.0
    for one in rows:
        with torch.no_grad():
            logits = wide(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
        for place in range(1, len(one.labels)):
            if one.labels[place] != MASKED:
                total -= float(logits[place - 1, one.labels[place]])
                right += int(logits[place - 1].argmax()) == one.labels[place]
                count += 1
    model.float()
    scored = score(found)
    assert found[:, 1].sum() == count
    assert scored.values["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scored.values["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert scored.values["tokens_right"] == pytest.approx(right / count)
    low, high = scored.intervals["loss"]
    assert low < scored.values["loss"] < high
    assert scored.primary == "loss" and scored.rows == 6


def test_a_loss_that_is_no_number_is_an_error(model: nn.Module) -> None:
    broken = AutoModelForCausalLM.from_config(model.config)
    nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(DivergedError, match="not finite for 2 of 2 rows"):
        measured(broken, [row(4), row(5)], Padding(0))
