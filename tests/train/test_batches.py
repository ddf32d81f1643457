"""The order of rows, learning rates by layer, and what deltaw chooses by itself."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers import GPT2ForSequenceClassification as GPT2

from deltaw.optim.layerwise import blocks
from deltaw.train import rates
from deltaw.train.advice import advice
from deltaw.train.batches import EpochSampler, SteadyBatches
from deltaw.train.methods import thaw_last
from deltaw.train.model import shape
from deltaw.train.recipe import Recipe, parse

LEAST = {"model": "m", "data": "d"}


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    batch=st.integers(1, 9),
    bucketed=st.booleans(),
    first=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_epoch_visits_every_row_once_in_an_order_of_its_own(
    lengths: list[int], batch: int, bucketed: bool, first: bool, epoch: int
) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(lengths, batch, seed, bucketed=bucketed, longest_first=first)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, epoch)) == list(range(len(lengths)))
    assert order(0, epoch) == order(0, epoch)
    if len(lengths) > 50:
        assert order(0, epoch) != order(0, epoch + 1)
        assert order(0, epoch) != order(1, epoch)


@pytest.mark.parametrize("bucketed", [True, False])
def test_the_longest_row_may_come_first_but_in_the_first_epoch_only(bucketed: bool) -> None:
    lengths = [1 + (index * 37) % 100 for index in range(64)]

    def places(longest_first: bool, epoch: int) -> int:
        sampler = EpochSampler(lengths, 8, 0, bucketed=bucketed, longest_first=longest_first)
        sampler.set_epoch(epoch)
        return [lengths[row] for row in sampler].index(max(lengths))

    assert places(True, 0) < 8
    assert places(True, 1) == places(False, 1) >= 8
    assert places(False, 0) >= 8


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    batch=st.integers(1, 9),
    first=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches_that_stay_together_come_in_an_order_of_their_own(
    lengths: list[int], batch: int, first: bool, epoch: int
) -> None:
    sampler = SteadyBatches(lengths, batch, 0, bucketed=False, longest_first=first)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    found = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    whole = [list(range(at, min(at + batch, len(rows)))) for at in range(0, len(rows), batch)]
    assert sorted(found) == whole
    assert found[-1] == whole[-1] or len(lengths) % batch == 0
    if first and epoch == 0 and len(lengths) % batch == 0:
        assert max(lengths[row] for row in found[0]) == max(lengths)
    if len(whole) > 30:
        sampler.set_epoch(epoch + 1)
        assert list(sampler) != rows


def test_buckets_hold_similar_lengths() -> None:
    lengths = [1 + (index * 37) % 100 for index in range(1000)]

    def padding(bucketed: bool) -> int:
        rows = list(EpochSampler(lengths, 8, 0, bucketed=bucketed))
        batches = [[lengths[row] for row in rows[i : i + 8]] for i in range(0, len(rows), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(True) < 0.1 * padding(False)


def test_blocks_and_frozen_layers_of_gpt2() -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    model = GPT2(config)
    assert blocks(model) == list(model.transformer.h)
    thaw_last(model, 2)
    free = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad
            and name.startswith("transformer.h.")}  # fmt: skip
    assert free == {"1", "2"}
    assert model.score.weight.requires_grad
    assert not model.transformer.wte.weight.requires_grad


def recipe(**values: object) -> Recipe:
    return parse(LEAST | values)


def bert(width: int) -> rates.Shape:
    return rates.Shape(width, "bert", causal=False)


@pytest.mark.parametrize(
    ("method", "width", "steps", "rate"),
    [
        ("full", 768, 500, 5e-5),
        ("lora", 768, 500, 5e-4),
        ("lora", 768, 99, 7.5e-4),
        ("lora", 384, 500, 2e-3),
        ("bitfit", 384, 500, 2e-3),
        ("full", 384, 500, 2e-4),
        ("lora", 1024, 500, 2.8e-4),
        ("lora", 16, 500, 2e-3),
        ("head", 768, 500, 2.5e-3),
    ],
)
def test_learning_rates_by_rule(method: str, width: int, steps: int, rate: float) -> None:
    assert rates.learning_rate(recipe(method=method), bert(width), steps).value == pytest.approx(
        rate
    )


@pytest.mark.parametrize(
    ("family", "width", "values", "rate"),
    [
        ("llama", 2048, {}, 4.9e-4),
        ("llama", 4096, {}, 2.9e-4),
        ("llama", 8192, {}, 1.7e-4),
        ("qwen2", 2048, {}, 5.0e-4),
        ("qwen3_moe", 8192, {}, 4.5e-4),
        ("mistral", 4096, {}, 2.9e-4),
        ("llama", 4096, {"method": "full"}, 2.9e-5),
        ("llama", 4096, {"task": "sft"}, 2.9e-4),
        ("t5", 1024, {"task": "sft"}, 8.4e-4),
        ("gpt2", 64, {"task": "sft"}, 7.4e-3),
        ("mistral", 4096, {"task": "dpo"}, 2.9e-5),
        ("t5", 1024, {}, 2.8e-4),
    ],
)
def test_learning_rates_of_language_models(family, width, values, rate) -> None:
    """The published values, by 5e-4 (2000 / width)^p, of adapters in a long run."""
    model = rates.Shape(width, family, causal=family != "t5")
    chosen = rates.learning_rate(recipe(**values), model, 500)
    assert chosen.value == pytest.approx(rate)


@pytest.mark.parametrize(("config", "causal"), [(LlamaConfig(), True), (BertConfig(), False)])
def test_shapes(config, causal) -> None:
    assert shape(config).causal is causal
    assert shape(config).width == config.hidden_size


@given(rows=st.integers(1, 10**6), batch=st.integers(1, 64), times=st.integers(1, 4))
def test_length_of_a_run(rows: int, batch: int, times: int) -> None:
    chosen = recipe(batch_size=batch, gradient_accumulation=times)
    epochs = rates.epochs(chosen, rows).value
    steps = rates.steps(chosen, rows)
    assert 3 <= epochs <= 20
    assert steps == epochs * math.ceil(math.ceil(rows / batch) / times)
    assert 1 <= rates.evaluate_every(chosen, rows, steps) <= 500
    assert rates.steps(recipe(max_steps=7), 10**5) == 7
    each = chosen.model_copy(update={"eval_each_epoch": True})
    assert rates.evaluate_every(each, rows, steps) * epochs == steps


def test_a_width_below_the_floor_is_named_with_what_it_counts_as() -> None:
    assert (
        "(768/384)² (width 32 counts as 384)" in rates.learning_rate(recipe(), bert(32), 500).origin
    )
    assert "counts as" not in rates.learning_rate(recipe(), bert(384), 500).origin


@pytest.mark.parametrize(
    ("settings", "rows", "word"),
    [
        ({}, 5000, None),
        ({"r": 64, "use_rslora": True}, 5000, None),
        ({"r": 64}, 5000, "use_rslora"),
        ({"r": 32, "lora_dropout": 0.1}, 300, "r=8"),
        ({}, 300, "lora_dropout=0"),
        ({"lora_alpha": 64}, 5000, "lora_alpha/r = 8"),
        ({"lora_dropout": 0.2}, 50_000, "50000 rows"),
        ({"lora_dropout": 0.5}, 500, "unusually high"),
        ({"target_modules": ["query", "value"]}, 5000, "all linear layers"),
        ({"batch_size": 128}, 5000, "128 rows"),
        ({"method": "full"}, 300, None),
    ],
)
def test_advice_comes_with_a_source_and_only_when_something_is_unusual(
    settings: dict[str, object], rows: int, word: str | None
) -> None:
    partial = "target_modules" in settings
    lines = advice(recipe(**settings), rows, 1e-3, 1e-3, partial=partial)
    assert len(lines) == (0 if word is None else 1)
    assert all(word in line and ("arXiv" in line or "2025" in line) for line in lines if word)
    assert "usual 0.001" in advice(recipe(), rows, 1e-2, 1e-3, partial=False)[0]
