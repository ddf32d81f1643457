"""Law 7: the output's dtype is the base's; adapters are float32 masters computing in the base's
dtype, or autocast's."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deltaw
from deltaw.errors import StateError
from laws.building import adapt, adapted, base, fill, loss, parts
from laws.cases import Stack
from laws.product import DTYPES, Setting, setting
from laws.running import over_cases, over_pairs
from laws.test_law03_oracle import plain_steps

HALF = (torch.bfloat16, torch.float16)


def output_has_the_bases_dtype(setting: Setting) -> None:
    """In evaluation, training, sums; and masters are float32 or wider."""
    model = base(setting)
    x = setting.case.x(setting.dtype)
    expected = model(x).dtype
    fill(adapt(model, setting))
    fill(adapt(model, setting, "second", 4), "second", 6)
    wide = torch.promote_types(torch.float32, setting.dtype)
    for which in ("default", "second", {"default": 0.5, "second": 0.5}):
        deltaw.activate(model, which)
        assert model(x).dtype == expected == setting.dtype
        assert model.train()(x).dtype == expected
        model.eval()
    assert {
        p.dtype
        for name in ("default", "second")
        for a in parts(model, name)
        for p in a.parameters()
    } == {wide}


class Products(TorchDispatchMode):
    """The dtypes of all matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if "mm" in str(func) or "convolution" in str(func):
            self.seen.add(output.dtype)
        return output


def branch_computes_in(setting: Setting, autocast: torch.dtype | None) -> set[torch.dtype]:
    """The dtypes of the products in the forward pass, with kernels and without."""
    model = adapted(setting)
    with Products() as products:
        for steps in (nullcontext(), plain_steps()):
            with steps, torch.autocast("cpu", autocast, enabled=autocast is not None):
                model(setting.case.x(setting.dtype))
    return products.seen


def autocast_gives_the_bases_dtype(setting: Setting, to: torch.dtype) -> None:
    """Output dtypes under autocast are those of the base under autocast, gradients are float32."""
    model = base(setting)
    x = setting.case.x(setting.dtype)
    with torch.autocast("cpu", to):
        expected = model(x)
    fill(adapt(model, setting), size=0.05)
    with torch.autocast("cpu", to):
        y = model(x)
        assert y.dtype == expected.dtype
        total = loss(model, setting)
    total.backward()
    assert {p.grad.dtype for a in parts(model) for p in a.parameters()} == {torch.float32}


@over_pairs()
def test_output_dtype(setting: Setting) -> None:
    output_has_the_bases_dtype(setting)


def low_rank(case) -> bool:
    """Leave out what has no ΔW, and products that are a package's own."""
    return case.form != "module" and not case.packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_cases(low_rank)
def test_branch_dtype(case, dtype: torch.dtype) -> None:
    assert branch_computes_in(Setting(case, dtype=dtype), None) == {dtype}


@pytest.mark.parametrize("to", HALF, ids=str)
@over_cases(lambda case: low_rank(case) and case.file != "embedding")
def test_branch_dtype_under_autocast(case, to: torch.dtype) -> None:
    assert branch_computes_in(Setting(case), to) == {to}


@pytest.mark.parametrize("to", HALF, ids=str)
@over_cases()
def test_autocast(case, to: torch.dtype) -> None:
    autocast_gives_the_bases_dtype(Setting(case), to)


def stays_close_to_float32(dtype: torch.dtype) -> None:
    """A stack in half precision follows the same stack in float32."""
    models = []
    for to in (torch.float32, dtype):
        torch.manual_seed(0)
        model = Stack().eval()
        model.head = nn.Identity()
        model = model.to(dtype).to(to)
        deltaw.attach(model, deltaw.LoraConfig(r=3, target_modules=["embed", "up", "gpt2"]))
        models.append(fill(model))
    x = torch.randint(0, 11, (4, 7))
    a, b = (model(x).detach().double() for model in models)
    assert (a - b).norm() <= (2e-2 if dtype is torch.bfloat16 else 2e-3) * a.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stays_close_to_float32(dtype: torch.dtype) -> None:
    stays_close_to_float32(dtype)


CASTS = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.float64),
    "layer": lambda m: m.layer.bfloat16(),
    "head": lambda m: m.head.dense.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_after_attach_is_refused(cast) -> None:
    model = adapted(setting("linear", head=True))
    before: dict[str, Tensor] = dict(model.state_dict())
    with pytest.raises(StateError, match="Fix: detach"):
        cast(model)
    assert {k: v.dtype for k, v in model.state_dict().items()} == {
        k: v.dtype for k, v in before.items()
    }
    model.to("cpu").float()
