"""Packed layers that are made dense again."""

import pytest
import torch
from quant.packed_models import BNB, KINDS, adapt, batch, bnb, dense, net, over
from torch import nn

import deltaw
from deltaw.errors import MergeError, StateError
from deltaw.quant import bnb4, storage_of

ROUNDED = {"int8": 5e-2}
"""LLM.int8() rounds the input to 8 bits in evaluation."""


@over(*KINDS)
def test_every_packed_layer_becomes_a_plain_one_of_the_same_values(kind: str) -> None:
    model = net(kind)
    expected, seen = model(batch()), {path: dense(model.get_submodule(path)) for path in PATHS}
    attributes = set(vars(net().up))
    assert deltaw.dequantize(model) == PATHS
    for path in PATHS:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        assert layer.weight.dtype is torch.float32 and not layer.weight.requires_grad
        assert torch.equal(layer.weight, seen[path]) and set(vars(layer)) == attributes
    found = model(batch())
    assert (found - expected).abs().max() <= ROUNDED.get(kind, 1e-5) * expected.abs().max()
    assert not any(storage_of(module) for module in model.modules())


PATHS = ("up", "down")


@over(*BNB)
def test_the_dtype_is_that_of_the_base_or_the_one_asked_for(kind: str) -> None:
    model = net(kind, torch.bfloat16)
    deltaw.dequantize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = net(kind, torch.bfloat16)
    exact = dense(model.up)
    deltaw.dequantize(model, torch.float64)
    assert model.up.weight.dtype is torch.float64
    assert torch.equal(model.up.weight, exact.double())
    assert model.up(batch(torch.float64)).dtype is model.up.bias.dtype is torch.float64


@bnb
def test_what_was_trained_on_some_layers_becomes_a_plain_model() -> None:
    model = net("nf4")
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["up"]))
    nn.init.normal_(model.up.adapter["default"].weight.lora_B)
    expected = model(batch())
    with pytest.raises(StateError, match=r"(?s)adapted layers:\n  - up\nFix: .*merge.*detach"):
        deltaw.dequantize(model)
    assert torch.equal(model(batch()), expected)
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    assert deltaw.dequantize(model) == ("down",)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.requires_grad_(True)
    model(batch()).sum().backward()
    assert model.down.weight.grad is not None


@bnb
def test_a_dense_model_can_be_packed_and_adapted_again() -> None:
    model = net("nf4")
    deltaw.dequantize(model)
    deltaw.quantize(model, "nf4", exclude_modules=["last"])
    adapt(model)
    assert storage_of(model.up) is not None


def test_nothing_to_unpack() -> None:
    with pytest.raises(StateError, match="No weight of Net is packed"):
        deltaw.dequantize(net())


@bnb
def test_what_has_no_dense_form_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("nf4")
    kinds = {path: type(module) for path, module in model.named_modules()}
    monkeypatch.setattr(bnb4.Bnb4, "plain", lambda self, layer: None)
    with pytest.raises(MergeError, match=r"(?s)- up: Linear4bit has .*- down: .*Fix: load"):
        deltaw.dequantize(model)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
