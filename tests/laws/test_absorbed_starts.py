"""Starts that are taken out of W, by choice: the algebra is that of those subtracted beside it."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import deltaw
from deltaw import inits
from laws.building import adapt, base, config, parts, run, same_bits, source
from laws.cases import Case
from laws.oracle import Tensors
from laws.product import Setting, ranks, setting
from laws.running import over_cases
from laws.test_law03_oracle import close

STARTS = {name for name in inits.names() if not inits.at_zero(name)}


def of(case: Case) -> Setting:
    """The case with a start of the highest rank that it has."""
    return Setting(case, torch.float64, init="pissa", rank=ranks(case, "pissa")[0])


def absorbed(s: Setting, model: nn.Module, *, seed: int = 3) -> nn.Module:
    """Attach at the setting's start and take it out of W."""
    generator = torch.Generator().manual_seed(seed)
    deltaw.attach(model, source(s, model), generator=generator, absorb=True)
    return model


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Move A, B and copies from where they started, as training does."""
    generator = torch.Generator().manual_seed(5)
    for adapter in parts(model):
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def weights(s: Setting, model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layer that hold a slot, by name."""
    layer = model.layer
    return {
        name: p.detach().clone()
        for name, p in layer.named_parameters()
        if "weight" in name and ".adapter." not in f".{name}"
    }


def deltas(s: Setting, model: nn.Module, kind: str) -> Tensors:
    """s B A of the start or of what is there now, by the oracle."""
    tensors: dict[str, Tensor] = {}
    for path, at in deltaw.capture(model).layers.items():
        before = path.removeprefix("layer").removeprefix(".")
        for name, t in at.tensors.items():
            if f".{kind}_" in name:
                key = ".".join(filter(None, [before, name.replace(kind, "lora")]))
                tensors[key] = t.double()
    return s.case.deltas(model.layer, tensors, s.scale)


dense = over_cases(lambda case: case.form == "config" and not case.packed and case.mergeable)


@dense
def test_the_residual_is_w_less_the_start(case: Case) -> None:
    s = of(case)
    model = base(s)
    before, y = weights(s, model), run(model, s)
    absorbed(s, model)
    found, start = weights(s, model), deltas(s, model, "start")
    assert start and all(delta.any() for delta in start.values())
    for name, W in before.items():
        close(found[name], W - start.get(name, 0), 1e-12)
    close(run(model, s), y, 1e-11)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapter." not in n)


@dense
def test_outputs_and_gradients_are_those_of_the_subtracted_start(case: Case) -> None:
    s = of(case).but(dropout=0.0)
    models = [adapt(base(s), s), absorbed(s, base(s))]
    found = []
    for model in models:
        moved(model)
        x = s.case.x(torch.float64)
        x = x.requires_grad_() if x.is_floating_point() else x
        y = model(x)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((y, {**grads, "x": x.grad} if x.is_floating_point() else grads))
    (y, grads), (z, others) = found
    close(y, z, 1e-11)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        close(grad, others[name], 1e-10)


@dense
def test_merging_is_that_of_plain_lora_on_the_residual(case: Case) -> None:
    s = of(case)
    model = moved(absorbed(s, base(s)))
    before, y = weights(s, model), run(model, s)
    added = deltas(s, model, "lora")
    deltaw.merge(model)
    for name, W in weights(s, model).items():
        close(W, before[name] + added.get(name, 0), 1e-12)
    close(run(model, s), y, 1e-11)
    deltaw.unmerge(model)
    assert all(same_bits(W, before[name]) for name, W in weights(s, model).items())
    assert same_bits(run(model, s), y)
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    close(run(model, s), y, 1e-11)
    assert not [name for name in model.state_dict() if ".adapter." in name]


@dense
def test_the_file_is_one_for_the_base_as_it_was(case: Case, tmp_path: Path) -> None:
    s = of(case)
    model = moved(absorbed(s, base(s)))
    assert deltaw.capture(model).base == deltaw.capture(adapt(base(s), s)).base
    y = run(model, s)
    deltaw.save(model, tmp_path)
    original = base(s)
    deltaw.load(original, tmp_path)
    close(run(original, s), y, 1e-5)  # the file holds float64 factors less those of the start
    for trainable in (True, False):
        again = base(s)
        deltaw.load(again, tmp_path, absorb=True, trainable=trainable)
        found = weights(s, model)
        assert all(same_bits(W, found[name]) for name, W in weights(s, again).items())
        assert same_bits(run(again, s), y)
    assert deltaw.capture(again).base == deltaw.capture(model).base


@pytest.mark.parametrize("init", sorted(STARTS - {"loftq"}))
def test_every_start_goes_in(init: str) -> None:
    s = setting("linear", dtype=torch.float64, init=init, rank=(2, 3.0))
    model = base(s)
    y = run(model, s)
    data = {}
    if inits.from_data(init):
        data = {"data": [s.case.x(torch.float64)], "loss": lambda m, x: m(x).square().sum()}
    deltaw.attach(model, config(s), absorb=True, **data)
    close(run(model, s), y, 1e-12)
    moved(model)
    start, now = deltas(s, model, "start")["weight"], deltas(s, model, "lora")["weight"]
    x, W = s.case.x(torch.float64), base(s).layer.weight
    close(model.layer(x), x @ (W - start + now).T + model.layer.bias, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_is_rounded_once(dtype: torch.dtype) -> None:
    s = setting("linear", dtype=dtype, init="pissa", rank=(3, 5.0))
    model = base(s)
    W = model.layer.weight.detach().double()
    absorbed(s, model)
    exact = W - deltas(s, model, "start")["weight"]
    assert model.layer.weight.dtype == dtype
    error = (model.layer.weight.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-6).all()


def test_copies_give_the_same_output() -> None:
    s = setting("linear", init="pissa", bias="all", head=True)
    model = moved(absorbed(s, base(s)))
    y = run(model, s)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert same_bits(run(twin, s), y)
        with pytest.raises(deltaw.errors.StateError, match="absorbed"):
            deltaw.detach(twin)
    fresh = absorbed(s, base(s, seed=4))
    fresh.load_state_dict(model.state_dict())
    assert same_bits(run(fresh, s), y)


def test_there_is_no_base_to_go_back_to() -> None:
    s = setting("linear", init="pissa", rank=(2, 3.0))
    model = absorbed(s, base(s))
    before, y = weights(s, model), run(model, s)
    for verb in (deltaw.detach, lambda model: deltaw.disabled(model).__enter__()):
        with pytest.raises(deltaw.errors.StateError, match="load the base again"):
            verb(model)
    assert same_bits(run(model, s), y)
    assert all(same_bits(W, before[name]) for name, W in weights(s, model).items())


def test_one_graph() -> None:
    torch._dynamo.reset()
    s = setting("linear", init="pissa")
    model, x = moved(absorbed(s, base(s))), s.case.x(torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x), 1e-6)
        moved(model)
        close(compiled(x), model(x), 1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()
