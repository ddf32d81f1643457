"""Laws that the product checks for the usual start alone, for one that is subtracted."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import deltaw
from laws.building import adapt, adapted, base, fill, parts, run
from laws.cases import BY_NAME
from laws.product import setting
from laws.test_law03_oracle import close
from laws.test_law05_copies import state_dict_restores
from laws.test_law11_freshness import CHANGES, forward_is_fresh

NAMES = ("linear", "gpt2-fused-101", "conv2d-depthwise", "embedding")


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_restores_the_start_too(name: str) -> None:
    s = setting(name, init="pissa", bias="all")
    assert any("start_A" in key for key in adapted(s).state_dict())
    state_dict_restores(s)


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_forward_is_fresh(change: str) -> None:
    forward_is_fresh(setting("linear", init="pissa", head=True), CHANGES[change])


@pytest.mark.parametrize("trainable", [True, False])
def test_rows_under_starts_of_their_own(trainable: bool) -> None:
    s = setting("linear", dtype=torch.float64)
    model = base(s)
    for seed, (name, init) in enumerate({"a": "pissa", "b": True, "c": "olora"}.items()):
        own = s.but(init=init, rank=(seed + 1, 5.0))
        fill(adapt(model, own, name, seed), name, seed)
    model.requires_grad_(trainable)
    x, names = torch.randn(4, 3, 5, dtype=torch.float64), ["c", None, "a", "b"]
    expected = []
    for row, name in zip(x.split(1), names, strict=True):
        deltaw.activate(model, name)
        expected.append(model(row))
    for graded in (True, False):
        with torch.set_grad_enabled(graded), deltaw.rows(model, names):
            for _ in range(2):
                close(model(x), torch.cat(expected), 1e-12)


def test_one_graph() -> None:
    torch._dynamo.reset()
    s = setting("linear", init="pissa")
    model, x = adapted(s), s.case.x(torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x), 1e-6)
        for part in parts(model):
            part.lora_B.mul_(1.5)
        close(compiled(x), model(x), 1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant: bool) -> None:
    s = setting("linear", init="pissa", dropout=0.25)
    model = adapted(s).train()
    x = s.case.x(torch.float32).requires_grad_()
    held = [p for p in model.parameters() if p.requires_grad]
    found = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        model.zero_grad()
        y.square().sum().backward()
        found.append([p.grad.clone() for p in held])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-6)


def test_the_first_step_is_the_papers() -> None:
    """dA = s Bᵀ dY Xᵀ and dB = s dY (A X)ᵀ at the start, as if B A alone were there."""
    s = setting("linear", init="pissa", dtype=torch.float64, rank=(3, 5.0))
    model = adapt(base(s), s)
    x = s.case.x(torch.float64)
    y = model(x)
    (dY,) = torch.autograd.grad(y.square().sum(), y, retain_graph=True)
    y.square().sum().backward()
    (part,) = parts(model)
    G = dY.flatten(0, 1).T @ x.flatten(0, 1)
    scale = 5 / 3
    close(part.lora_A.grad, scale * part.lora_B.T @ G, 1e-12)
    close(part.lora_B.grad, scale * G @ part.lora_A.T, 1e-12)


def test_several_starts_sum() -> None:
    s = setting("conv2d-depthwise", dtype=torch.float64)
    case = BY_NAME["conv2d-depthwise"]
    model = base(s)
    plain = run(model, s)
    for seed, (name, init) in enumerate({"a": "pissa", "b": "lora_ga"}.items()):
        adapt(model, s.but(init=init), name, seed)
    deltaw.activate(model, {"a": 0.75, "b": -2.0})
    assert torch.equal(run(model, s), plain)
    total = 0
    for seed, (name, weight) in enumerate({"a": 0.75, "b": -2.0}.items()):
        fill(model, name, seed)
        tensors = {
            k: t.double() for k, t in deltaw.capture(model, name).layers["layer"].tensors.items()
        }
        total = total + weight * case.learned(model.layer, tensors, s.scale)
    W = model.layer.weight.detach() + total
    expected = case.apply(model.layer, case.x(torch.float64), W, model.layer.bias)
    close(model.layer(case.x(torch.float64)), expected, 1e-11)
