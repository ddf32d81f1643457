"""Merging into packed weights: dense by default, packed again when asked, and back bit by bit."""

import copy
import pickle

import pytest
import torch
from laws.building import assert_same_state
from quant.packed_models import KINDS, adapt, batch, bnb, dense, net, over
from torch import nn

import deltaw
from deltaw.errors import ConfigError, MergeError, StateError
from deltaw.quant import storage_of


def delta(model: nn.Module, path: str) -> torch.Tensor:
    """s B A in float64."""
    tensors = deltaw.capture(model).layers[path].tensors
    return 5 / 3 * tensors["weight.lora_B"].double() @ tensors["weight.lora_A"].double()


@over(*KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_writes_dense_weights(kind: str, dtype: torch.dtype) -> None:
    """The correctly rounded sum of the unpacked weight and ΔW, in a plain layer."""
    model = adapt(net(kind, dtype))
    plain = model(batch(dtype)).detach()
    expected = {p: dense(model.get_submodule(p)).double() + delta(model, p) for p in ("up", "down")}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = [model.up.weight, model.down.weight]
    deltaw.merge(model, dtype=dtype)
    for path, W in expected.items():
        layer = model.get_submodule(path)
        assert type(layer.weight) is nn.Parameter and storage_of(layer) is None
        assert layer.weight.dtype == dtype
        unit = torch.finfo(dtype).eps * 2.0 ** W.abs().clamp(1e-6).log2().floor()
        assert ((layer.weight.double() - W).abs() <= unit / 2 + 1e-6).all()
    tolerance = 5e-2 if kind == "int8" or dtype is torch.bfloat16 else 1e-5
    assert torch.allclose(model(batch(dtype)), plain, atol=tolerance, rtol=tolerance)
    deltaw.unmerge(model)
    assert model.up.weight is weights[0] and model.down.weight is weights[1]
    assert_same_state(dict(model.state_dict()), before)
    assert torch.equal(model(batch(dtype)), plain)


@over(*KINDS)
def test_a_final_merge_leaves_a_plain_model(kind: str) -> None:
    model = adapt(net(kind))
    plain = model(batch()).detach()
    deltaw.merge(model, original="none", dtype=torch.float32)
    with pytest.raises(StateError, match="final"):
        deltaw.unmerge(model)
    deltaw.detach(model)
    assert [type(m) for m in model.children()] == [type(m) for m in net().children()]
    assert list(model.state_dict()) == list(net().state_dict())
    assert vars(model.up).keys() == vars(net().up).keys()
    assert torch.allclose(model(batch()), plain, atol=3e-2 if kind == "int8" else 1e-5)
    model.load_state_dict(net().state_dict(), strict=True)


@over(*KINDS)
def test_packing_again(kind: str) -> None:
    """What comes out is what packing the dense sum gives."""
    model = adapt(net(kind))
    sums = dense(model.up) + delta(model, "up").float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain, weight = model(batch()).detach(), model.up.weight
    deltaw.merge(model, requantize=True)
    assert type(model.up).origin is not None and type(model.up.weight) is type(weight)
    own = net()
    own.up.weight.data = sums
    deltaw.quantize(own, kind, exclude_modules=["last"])
    difference = (dense(model.up) - dense(own.up)).abs()
    assert difference.mean() <= 1e-5  # some values may round to the next step
    merged = model(batch()).detach()
    assert not torch.equal(merged, plain)
    with torch.no_grad():
        assert torch.allclose(merged, model(batch()), atol=1e-5)
    deltaw.unmerge(model)
    assert model.up.weight is weight
    assert_same_state(dict(model.state_dict()), before)
    assert torch.equal(model(batch()), plain)


@over(*KINDS)
@pytest.mark.parametrize("requantize", [False, True])
def test_copies_of_a_merged_model_can_be_unmerged(kind: str, requantize: bool) -> None:
    model = adapt(net(kind))
    plain = model(batch()).detach()
    deltaw.merge(model, requantize=requantize)
    merged = model(batch()).detach()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(batch()), merged)
        deltaw.unmerge(made)
        assert torch.equal(made(batch()), plain)


@over(*KINDS)
def test_measuring(kind: str) -> None:
    """The difference is that of the two outputs, and packing again costs more than rounding."""
    drifts = []
    for requantize in (False, True):
        model = adapt(net(kind)).train()
        before = model.eval()(batch()).detach().double()
        drifts.append(deltaw.measure_merge(model.train(), batch(), requantize=requantize))
        assert model.training
        after = model.eval()(batch()).detach().double()
        difference = (after - before).abs()
        assert drifts[-1].mean == pytest.approx(difference.mean().item(), abs=1e-6)
        assert drifts[-1].largest == pytest.approx(difference.max().item(), abs=1e-6)
        assert drifts[-1].size == pytest.approx(before.square().mean().sqrt().item())
    assert drifts[1].mean > drifts[0].mean or kind == "int8"
    assert "at most" in str(drifts[0])


@over(*KINDS)
def test_what_cannot_be_merged_changes_nothing(kind: str) -> None:
    model = adapt(net(kind))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    for place, path in (("cpu", None), ("file", "originals.safetensors")):
        with pytest.raises(MergeError, match=r"(?s)up: a packed weight is kept where it is.*down"):
            deltaw.merge(model, original=place, path=path)
    for requantize in (False, True):
        with torch.no_grad():
            model.down.adapter["default"]["weight"].lora_B[0, 0] = torch.inf
        with pytest.raises(MergeError, match=r"down\.weight would hold NaN or Inf"):
            deltaw.merge(model, requantize=requantize)
    with torch.no_grad():
        model.down.adapter["default"]["weight"].lora_B[0, 0] = 0
    deltaw.detach(model)
    assert {k: v for k, v in before.items() if ".adapter." not in k}.keys() == set(
        model.state_dict()
    )
    assert len(classes) > len(list(model.modules()))


@over("torchao-int8")
def test_a_weight_that_cannot_be_packed_again(kind: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = net()
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, config, lambda module, path: path in ("up", "down"))
    adapt(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(MergeError, match=r"(?s)up: a merged weight cannot be packed as .*down"):
        deltaw.merge(model, requantize=True)
    assert [type(m) for m in model.modules()] == classes
    deltaw.merge(model)
    assert type(model.up.weight) is nn.Parameter
    deltaw.unmerge(model)


@over(*KINDS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_layer_merged_in_another_dtype_runs_in_it(kind: str, bias: str) -> None:
    """Its own bias goes along and comes back bit by bit; the rest of the model is cast by hand."""
    model = adapt(net(kind), bias=bias)
    plain = model(batch()).detach()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    deltaw.merge(model, dtype=torch.bfloat16)
    x = batch(torch.bfloat16)
    assert model.up.weight.dtype is model.up.bias.dtype is torch.bfloat16
    assert model.up(x).dtype is torch.bfloat16
    assert model.last.weight.dtype is torch.float32
    deltaw.unmerge(model)
    assert_same_state(dict(model.state_dict()), before)
    assert torch.equal(model(batch()), plain)
    deltaw.merge(model, original="none", dtype=torch.bfloat16)
    deltaw.detach(model)
    after = model.to(torch.bfloat16)(x)
    assert (after.float() - plain).abs().max() <= 0.1 * plain.abs().max()


@bnb
def test_choices_for_packed_weights_are_refused_where_none_is_packed() -> None:
    model = adapt(net())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for choice in ({"dtype": torch.bfloat16}, {"requantize": True}):
        with pytest.raises(MergeError, match=r"(?s)=.* has no effect: none .*Fix: leave it out"):
            deltaw.merge(model, **choice)
    assert_same_state(dict(model.state_dict()), before)
    with pytest.raises(ConfigError, match="leave requantize or dtype out"):
        deltaw.merge(adapt(net("nf4")), requantize=True, dtype=torch.bfloat16)
    mixed = net()
    deltaw.quantize(mixed, "nf4", exclude_modules=["last", "down"])
    deltaw.merge(adapt(mixed), dtype=torch.bfloat16)
    assert mixed.up.weight.dtype is torch.bfloat16 and mixed.down.weight.dtype is torch.float32


@bnb
def test_a_merge_that_cannot_be_measured_is_undone() -> None:
    """The norm after the layer is in float32."""
    model = adapt(net("nf4"))
    plain = model(batch()).detach()
    with pytest.raises(RuntimeError):
        deltaw.measure_merge(model.train(), batch(), dtype=torch.bfloat16)
    assert model.training and storage_of(model.up) is not None
    assert torch.equal(model.eval()(batch()), plain)
