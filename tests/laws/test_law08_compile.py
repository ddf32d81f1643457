"""Law 8: one graph under fullgraph, and switching or hot-swapping recompiles nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import deltaw
from laws.building import adapt, adapted, base, fill, loss, parts
from laws.cases import Stack
from laws.product import Setting, setting
from laws.running import over_cases


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test compiles from scratch."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(setting: Setting) -> None:
    """Forward and gradients are those of eager mode, in one graph."""
    model = adapted(setting)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = setting.case.x(setting.dtype)
    expected = model(x)
    loss(model, setting).backward()
    eager = gradients(model)
    y = compiled(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    loss(compiled, setting).backward()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, eager[name], rtol=1e-4, atol=1e-5), name
    assert counter.frame_count == 1


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients away by name."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


QUICK = (
    "linear",
    "gpt2-fused-101",
    "embedding-scaled",
    "conv2d-groups",
    "spanning-conv1d",
    "transposed2d-groups",
    "attention",
)


@over_cases(lambda case: case.name in QUICK)
def test_one_graph(case) -> None:
    one_graph(Setting(case, bias="all" if case.form == "config" else "none"))


# Dynamo makes an object of autograd functions that call a closure, as those of packed products do.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@over_cases()
def test_one_graph_everywhere(case) -> None:
    one_graph(Setting(case, head=case.form == "config", lora_bias=case.file == "linear"))


def several() -> tuple[Stack, Tensor]:
    """A stack with three adapters, one of another rank and with a head."""
    torch.manual_seed(0)
    model = Stack().eval()
    names = ["embed", "up", "fused", "mixing", "gpt2"]
    common = {"target_modules": names, "enable_lora": {"fused": [True, False, True]}}
    for seed, (name, r, saved) in enumerate((("a", 3, []), ("b", 2, ["head"]), ("c", 3, []))):
        settings = deltaw.LoraConfig(r=r, lora_alpha=5, modules_to_save=saved, **common)
        deltaw.attach(model, settings, name)
        fill(model, name, seed)
    return model, torch.randint(0, 11, (2, 7))


CHOICES = ("a", "b", {"a": 0.5, "c": -1.5}, "c", None, {"b": 2.0}, {"a": 1.0, "b": 1.0, "c": 1.0})


def switching_recompiles_nothing(
    backend: str = "eager", choices: Sequence[object] = CHOICES
) -> None:
    """Many more switches than dynamo's limit of recompilations, `disabled` once more."""
    model, x = several()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            for which in choices:
                deltaw.activate(model, which)
                expected = model(x)
                assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-5), which
        assert counter.frame_count == 1
        for _ in range(3):
            with deltaw.disabled(model):
                assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2


def test_switching_recompiles_nothing() -> None:
    switching_recompiles_nothing()


def hot_swapping_recompiles_nothing(folder: Path) -> None:
    """Another adapter of the same shapes under the same name."""
    model, x = several()
    for seed in range(3):
        fill(model, "a", seed + 20)
        deltaw.save(model, folder / str(seed), "a")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs = []
    with torch.no_grad():
        for seed in (0, 1, 2, 0):
            deltaw.load(model, folder / str(seed), "a", swap=True)
            outputs.append(compiled(x))
            assert torch.allclose(outputs[-1], model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])


def test_hot_swapping_recompiles_nothing(tmp_path: Path) -> None:
    hot_swapping_recompiles_nothing(tmp_path)


def test_training_steps_recompile_nothing() -> None:
    s = setting("linear", dropout=0.1)
    model = adapted(s).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW([p for a in parts(model) for p in a.parameters()])
    losses = []
    for _ in range(4):
        total = loss(compiled, s)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    assert counter.frame_count == 1
    assert len(set(losses)) == 4


def test_merging_shows_in_the_compiled_model() -> None:
    s = setting("linear")
    model = adapted(s)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = s.case.x(s.dtype)
    with torch.no_grad():
        first = compiled(x)
        with deltaw.merged(model):
            assert torch.allclose(compiled(x), first, atol=1e-5)
            assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x), first)


# inductor itself uses what torch calls deprecated
TORCHS_OWN = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*_prims_common:FutureWarning"
)


@pytest.mark.slow
@TORCHS_OWN
def test_inductor() -> None:
    switching_recompiles_nothing("inductor")


@pytest.mark.slow
@TORCHS_OWN
@pytest.mark.parametrize("name", QUICK)
def test_inductor_gradients(name: str) -> None:
    s = setting(name)
    model = fill(adapt(base(s), s))
    compiled = torch.compile(model, fullgraph=True)
    loss(model, s).backward()
    eager = gradients(model)
    loss(compiled, s).backward()
    for key, grad in gradients(model).items():
        assert torch.allclose(grad, eager[key], rtol=1e-4, atol=1e-5), key
