"""Law 6: only what was asked for requires gradients, all of it gets them when used, the idle rest
does not move."""

import pytest
import torch
from torch import Tensor, nn

import deltaw
from laws.building import (
    adapt,
    adapted,
    base,
    fill,
    loss,
    parts,
    same_bits,
    train,
)
from laws.cases import Case, Stack
from laws.product import Setting, setting
from laws.running import over_cases, over_pairs, whole_product


def wanted(setting: Setting) -> set[str]:
    """The names, worked out here, of what a setting trains."""
    case = setting.case
    names = set()
    if case.form != "module":
        count = len(case.enabled)
        on = [f"slice_{i}_of_{count}" for i, flag in enumerate(case.enabled) if flag]
        if case.file == "attention":
            marks = case.enabled or (True,) * 4
            on = [s for s, flag in zip(("q", "k", "v", "out"), marks, strict=True) if flag]
        for slot in on or ["weight"]:
            names |= {f"layer.{slot}.lora_A", f"layer.{slot}.lora_B"}
            if setting.method == "dora":
                names.add(f"layer.{slot}.lora_magnitude_vector")
            if setting.lora_bias:
                names.add(f"layer.{slot}.lora_B_bias")
        if setting.bias != "none":
            names |= {f"layer.{name}.trained" for name in case.biases()}
    else:
        names |= {"layer.weight.trained", "layer.bias.trained"}
    if setting.bias == "all":
        names.add("shift.bias.trained")
    if setting.head:
        names |= {
            f"head.{module}.{name}.trained"
            for module in ("dense", "norm")
            for name in ("weight", "bias")
        }
    return names


def exactly_the_wanted_train(setting: Setting) -> None:
    """By name; each gets a gradient that is not zero, and nothing else gets one."""
    model = adapted(setting).train()
    requires = {
        n.replace(".adapter.default", "") for n, p in model.named_parameters() if p.requires_grad
    }
    assert requires == wanted(setting)
    loss(model, setting).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # BatchNorm cancels every bias before it, and half precision may round one away
            cancelled = setting.head and "bias" in name and "head.norm" not in name
            cancelled |= ".k.lora_B_bias" in name  # one number more for all scores of a query
            if not cancelled and setting.dtype in (torch.float32, torch.float64):
                assert parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


def untrainable_when_asked(setting: Setting) -> None:
    """`trainable=False` gives the same output and no gradient at all."""
    model = adapted(setting)
    other = base(setting)
    deltaw.attach(other, deltaw.capture(model), trainable=False)
    assert not any(p.requires_grad for p in other.parameters())
    assert same_bits(
        model(setting.case.x(setting.dtype)).detach(), other(setting.case.x(setting.dtype))
    )


@over_pairs()
def test_exactly_the_wanted_train(setting: Setting) -> None:
    exactly_the_wanted_train(setting)


@over_cases()
def test_untrainable_when_asked(case) -> None:
    untrainable_when_asked(Setting(case))


@pytest.mark.slow
@over_cases()
def test_gradients_everywhere(case) -> None:
    whole_product(case, exactly_the_wanted_train, lambda s: s.dtype == torch.float32)


def idle_adapters_stay(setting: Setting) -> None:
    """Under AdamW with weight decay, bit for bit, whichever is active; gradients stay None."""
    model = base(setting)
    for seed, name in enumerate("ab"):
        fill(adapt(model, setting, name, seed), name, seed)
    for active, idle in (("a", "b"), ("b", "a")):
        deltaw.activate(model, active)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        before = values(model, idle), values(model, active)
        train(model, setting, steps=3)
        assert all(same_bits(x, y) for x, y in zip(before[0], values(model, idle), strict=True))
        moved = zip(before[1], values(model, active), strict=True)
        assert not all(same_bits(x, y) for x, y in moved)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert all(p.grad is None for part in parts(model, idle) for p in part.parameters())
        model.zero_grad()


def values(model: nn.Module, name: str) -> list[Tensor]:
    """Copies of an adapter's tensors."""
    return [
        t.detach().clone()
        for part in parts(model, name)
        for t in (*part.parameters(), *part.buffers())
    ]


@over_cases()
def test_idle_adapters_stay(case) -> None:
    idle_adapters_stay(
        Setting(case, head=case.form == "config", bias="all" if case.form == "config" else "none")
    )


def test_adapters_in_a_sum_all_move() -> None:
    s = setting("linear", bias="all")
    model = base(s)
    for seed, name in enumerate("abc"):
        fill(adapt(model, s, name, seed), name, seed)
    deltaw.activate(model, {"a": 0.5, "c": 2.0})
    before = {name: values(model, name) for name in "abc"}
    train(model, s)
    moved = {name: not all(map(same_bits, before[name], values(model, name))) for name in "abc"}
    assert moved == {"a": True, "b": False, "c": True}


def the_padding_row_gets_nothing(name: str) -> None:
    """No delta for the padding token in the output, no gradient in its column of A."""
    s = setting(name)
    model = adapted(s)
    layer = model.layer
    padding = layer.padding_idx
    tokens = torch.tensor([[padding, 1, padding]])
    y = layer(tokens)
    with deltaw.disabled(model):
        assert same_bits(y[0, 0].detach(), layer(tokens)[0, 0])
    y.square().sum().backward()
    A = next(parts(model)).lora_A
    assert A.grad[:, 1].any()
    assert not A.grad[:, padding].any()
    before = layer.frozen("weight")[padding].clone()
    deltaw.merge(model)
    assert same_bits(layer.frozen("weight")[padding], before)


@pytest.mark.parametrize("name", ["embedding-padding", "embedding-scaled"])
def test_the_padding_row(name: str) -> None:
    the_padding_row_gets_nothing(name)


def test_summary_counts_what_trains() -> None:
    model = Stack()
    settings = deltaw.LoraConfig(
        r=3,
        target_modules=["embed", "up", "fused", "mixing", "gpt2"],
        enable_lora={"fused": [True, False, True]},
        modules_to_save=["head"],
        bias="lora_only",
    )
    made = deltaw.attach(model, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_hand = 3 * (11 + 6) + 3 * (6 + 10) + 2 * 3 * (10 + 3) + 3 * (9 + 6) + 3 * (6 + 5)
    by_hand += (10 + 9 + 6 + 5) + (5 * 3 + 3 + 3 + 3)
    assert trained == by_hand == made.parameters == deltaw.summary(model).trainable


@over_cases()
def test_a_batch_without_rows(case: Case) -> None:
    """It passes where the base takes it, and gives gradients of zero."""
    s = Setting(case, head=case.form == "module")
    model, plain, x = adapted(s).train(), base(s), case.x(s.dtype)
    attention = case.file == "attention" and not plain.layer.batch_first
    x = x[:, :0] if attention else x[:0]
    try:
        expected = plain(x)
    except Exception:
        pytest.skip("the base takes none")
    y = model(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
