"""LLM.int8()'s scales follow a weight that was moved; a stale device is the meta device here."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from quant.packed_models import adapt, batch, bnb, dense, net
from torch import nn

import deltaw
from deltaw.quant.bnb8 import _follow

pytestmark = bnb


def leave_behind(layer: nn.Module) -> None:
    """Leave the bits elsewhere, as `Module.to` does, which moves a parameter's data alone."""
    holder = layer.weight if layer.weight.CB is not None else layer.state
    holder.CB = holder.CB.to("meta")


def hooks(layer: nn.Module) -> list[object]:
    return [hook for hook in layer._forward_pre_hooks.values() if hook is _follow]


COPIES = [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("copied", COPIES, ids=["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("first", [False, True], ids=["packed", "run"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_packed_layer_computes_where_it_was_moved(
    adapted: bool, first: bool, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapt(net("int8")) if adapted else net("int8")
    expected = net("int8")
    expected = (adapt(expected) if adapted else expected)(batch()).detach()
    if first:
        model(batch())
    model = copied(model)
    for layer in (model.up, model.down):
        leave_behind(layer)
        assert len(hooks(layer)) == 1
    assert torch.equal(model(batch()), expected)


@pytest.mark.parametrize("first", [False, True], ids=["packed", "run"])
def test_a_moved_weight_is_read_where_it_is(first: bool) -> None:
    model = net("int8")
    expected = dense(model.up)
    if first:
        model(batch())
    leave_behind(model.up)
    assert torch.equal(dense(model.up), expected)
    merged = adapt(model)
    leave_behind(merged.down)
    deltaw.merge(merged)
    assert torch.isfinite(merged(batch())).all()


def test_a_layer_with_a_dense_weight_has_no_hook() -> None:
    model = net("int8")
    deltaw.dequantize(model)
    assert not hooks(model.up)
    deltaw.quantize(model, "int8", exclude_modules=["last"])
    adapt(model)
    assert len(hooks(model.up)) == 1
    deltaw.merge(model)
    assert not hooks(model.up)
    deltaw.unmerge(model)
    assert len(hooks(model.up)) == 1
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    assert not model.up._forward_pre_hooks
