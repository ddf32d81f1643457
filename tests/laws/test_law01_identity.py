"""Law 1: attaching leaves the output as it was, for every start."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import deltaw
from deltaw.inits import Site, from_data, kind_of, refusal
from laws.building import adapt, base, fill, parts, run, same_bits, squares
from laws.product import DTYPES, STARTS, Setting, setting
from laws.running import over_cases, over_pairs, whole_product


def copied(setting: Setting) -> bool:
    """Whether something is trained in full: a weighted sum of equal copies rounds."""
    return setting.head or setting.bias != "none" or setting.case.form == "module"


def attaching_changes_no_output(setting: Setting) -> None:
    """Also in training, with a second adapter, and for the starts at hand."""
    model = base(setting)
    trained = None if setting.head else run(model.train(), setting)  # BatchNorm would move
    before = run(model.eval(), setting)
    adapt(model, setting)
    adapt(model, setting, "second", seed=4)
    sums = [{"default": 0.5, "second": 2.0}] if not copied(setting) else []
    for which in ("default", "second", *sums):
        deltaw.activate(model, which)
        after = run(model, setting)
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
    if trained is not None:
        assert torch.equal(run(model.train(), setting), trained)


@over_pairs()
def test_identity(setting: Setting) -> None:
    attaching_changes_no_output(setting)


@pytest.mark.slow
@over_cases()
def test_identity_everywhere(case) -> None:
    whole_product(case, attaching_changes_no_output)


@given(
    kind=st.sampled_from(["linear", "conv", "embedding"]),
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    r=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    init=st.sampled_from(STARTS),
)
@settings(max_examples=40)
def test_identity_for_drawn_shapes(kind, out, into, r, dtype, init) -> None:
    layer = {
        "linear": lambda: nn.Linear(into, out),
        "conv": lambda: nn.Conv1d(into, out, 2, padding=1),
        "embedding": lambda: nn.Embedding(into, out),
    }[kind]()
    model = nn.Sequential(layer).to(dtype)
    shape = (out, into * (2 if kind == "conv" else 1))
    zero = "A" if kind == "embedding" else "B"
    assume(not refusal(init, Site("", "", shape, r, 1.0, zero, None, lambda: layer.weight)))
    x = torch.arange(into) if kind == "embedding" else torch.randn(20, into, *[4][: kind == "conv"])
    x = x if kind == "embedding" else x.to(dtype)
    before = model(x)
    config = deltaw.LoraConfig(r=r, target_modules=["0"], init_lora_weights=init)
    deltaw.attach(model, config, **({"data": [x], "loss": squares} if from_data(init) else {}))
    assert torch.equal(model(x), before)


def start_is_the_seeds_alone(setting: Setting) -> None:
    """The same seed gives the same adapter whatever else ran, in any dtype of the base."""
    torch.manual_seed(1)
    first = adapt(base(setting), setting, seed=9)
    torch.manual_seed(2)
    second = adapt(base(setting, seed=2), setting, seed=9)
    other = adapt(base(setting), setting, seed=10)
    pairs = [
        (dict(a.named_parameters()), dict(b.named_parameters()), dict(c.named_parameters()))
        for a, b, c in zip(parts(first), parts(second), parts(other), strict=True)
        if not a.replaces
    ]
    assert all(same_bits(a[k], b[k]) for a, b, _ in pairs for k in a)
    assert all(any(not same_bits(a[k], c[k]) for k in a) for a, _, c in pairs)


@over_cases()
def test_the_seed_alone_decides(case) -> None:
    start_is_the_seeds_alone(Setting(case))


@pytest.mark.parametrize("init", STARTS)
def test_the_global_generator_is_left_alone(init: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    adapt(base(setting("linear")), setting("linear", rank=(2, 3.0), init=init))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", [n for n in STARTS if not from_data(n)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_start_is_that_of_the_same_values_in_float32(init: str, dtype: torch.dtype) -> None:
    s = setting("gpt2-fused-101", rank=(2, 3.0), init=init, dtype=dtype)
    models = [adapt(base(s), s), adapt(base(s).float(), s)]
    found = [[p.float() for a in parts(m) for p in a.parameters()] for m in models]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if kind_of(init) == "start":
        other = adapt(base(s, seed=1), s)
        drawn = [p.float() for a in parts(other) for p in a.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found[0], drawn, strict=True))


@over_cases()
def test_a_filled_adapter_changes_the_output(case) -> None:
    """Without this the law could not fail."""
    s = Setting(case)
    model = base(s)
    before = run(model, s)
    assert not torch.equal(run(fill(adapt(model, s)), s), before)
