"""Learning rates that shrink from the head to the embeddings."""

import pytest
import torch
from tests.core.models import Tower
from tests.core.tiny import bert, gpt2
from torch import nn

import deltaw
from deltaw.errors import ConfigError, TargetError
from deltaw.optim import layerwise


def test_rates_shrink_once_for_each_layer_below() -> None:
    model = Tower()
    groups = layerwise.groups(model, 0.8, 0.5, 0.1)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["head.weight"] == 0.8
    for i, rate in enumerate([0.1, 0.2, 0.4]):
        assert {v for n, v in by_name.items() if n.startswith(f"layers.{i}.")} == {rate}
    assert by_name["embed.weight"] == 0.05
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    torch.optim.AdamW(groups)


def test_a_pooler_moves_as_the_head_does() -> None:
    model = bert()
    found = layerwise.factors(model, 0.5)
    by_name = {name: found[p] for name, p in model.named_parameters()}
    assert by_name["classifier.weight"] == by_name["bert.pooler.dense.weight"] == 1.0
    assert by_name["bert.encoder.layer.0.output.dense.weight"] == 0.25
    assert by_name["bert.embeddings.word_embeddings.weight"] == 0.125


def test_adapters_move_as_the_block_they_are_in() -> None:
    model = bert()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["query"]))
    found = layerwise.factors(model, 0.5)
    by_name = {n: found[p] for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == {p for p in model.parameters() if p.requires_grad}
    assert {v for n, v in by_name.items() if ".layer.0." in n} == {0.25}
    assert {v for n, v in by_name.items() if n.startswith("classifier")} == {1.0}


def test_a_decay_of_one_is_one_rate() -> None:
    assert set(layerwise.factors(gpt2(), 1.0).values()) == {1.0}


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(TargetError, match=r"Sequential has no list of layers(.|\n)*Fix: "):
        layerwise.factors(nn.Sequential(nn.Linear(3, 3)), 0.9)
    for decay in (0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"must lie in \(0, 1\]"):
            layerwise.factors(Tower(), decay)
