"""Law 2: base keys and bits stay through attach, train and detach."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw
from laws.building import (
    adapt,
    assert_same_state,
    base,
    base_state,
    fill,
    run,
    same_bits,
    train,
)
from laws.cases import Stack
from laws.product import Setting, setting
from laws.running import over_cases, over_pairs, whole_product


def base_never_changes(setting: Setting) -> None:
    """Keys, their order, bits, classes and flags."""
    model = base(setting)
    model.shift.bias.requires_grad_(False)
    before = base_state(model)
    classes = {path: type(m) for path, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    output = run(model, setting)
    adapt(model, setting)
    assert_same_state(base_state(model), before)
    assert all(isinstance(model.get_submodule(p), kind) for p, kind in classes.items())
    train(model, setting)
    assert not torch.equal(run(model, setting), output)
    assert_same_state(base_state(model), before)
    deltaw.detach(model)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert_same_state(dict(model.state_dict()), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert same_bits(run(model, setting), output)


@over_pairs()
def test_base(setting: Setting) -> None:
    base_never_changes(setting)


@pytest.mark.slow
@over_cases()
def test_base_everywhere(case) -> None:
    whole_product(case, base_never_changes)


def base_checkpoint_loads(setting: Setting) -> None:
    """With strict=True, and without touching the adapter."""
    model = base(setting)
    other = base(setting, seed=8)
    checkpoint = {key: value.clone() for key, value in other.state_dict().items()}
    fill(adapt(model, setting))
    deltaw.attach(other, deltaw.capture(model))
    model.load_state_dict(checkpoint, strict=True)
    assert_same_state(base_state(model), checkpoint)
    assert same_bits(run(model, setting), run(other, setting))


@over_cases(lambda case: case.reloads)
def test_the_bases_own_checkpoint_loads(case) -> None:
    base_checkpoint_loads(Setting(case, head=case.form == "config"))


def test_names_inside_the_model() -> None:
    model = Stack()
    deltaw.attach(
        model,
        deltaw.LoraConfig(
            target_modules=["up", "fused"],
            enable_lora={"fused": [True, False, True]},
            bias="lora_only",
            modules_to_save=["head"],
        ),
        "mine",
    )
    added = {key for key in model.state_dict() if ".adapter." in key}
    assert added >= {
        "up.adapter.mine.weight.lora_A",
        "up.adapter.mine.weight.lora_B",
        "up.adapter.mine.bias.trained",
        "fused.adapter.mine.slice_0_of_3.lora_A",
        "fused.adapter.mine.slice_2_of_3.lora_B",
        "head.norm.adapter.mine.running_mean.trained",
    }
    assert not any("slice_1" in key for key in added)


def test_detaching_one_of_two_leaves_the_other() -> None:
    s = setting("linear", bias="all", head=True)
    alone = fill(adapt(base(s), s, "a"), "a", seed=6)
    both = fill(adapt(base(s), s, "a"), "a", seed=6)
    fill(adapt(both, s, "b", seed=4), "b", seed=7)
    deltaw.detach(both, "b")
    assert_same_state(dict(both.state_dict()), dict(alone.state_dict()))
    assert same_bits(run(both, s), run(alone, s))
    assert deltaw.active(both) == {"a": 1.0}


def test_thawed_flags_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    deltaw.attach(model, deltaw.LoraConfig())
    deltaw.attach(model, deltaw.LoraConfig(bias="all"), "second")
    deltaw.detach(model)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]


class Averaging(nn.Module):
    """A buffer alone, which the forward assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the running mean off."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


PARAMETERLESS = {
    "filled": lambda: nn.BatchNorm1d(4, affine=False),
    "assigned": Averaging,
    "both": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
}


def headed(make: Callable[[], nn.Module]) -> nn.Sequential:
    """A layer and a head that holds, among others, a module with buffers alone."""
    torch.manual_seed(0)
    head = nn.Sequential(OrderedDict(linear=nn.Linear(4, 4), norm=make()))
    return nn.Sequential(OrderedDict(up=nn.Linear(4, 4), head=head))


@pytest.mark.parametrize("make", PARAMETERLESS.values(), ids=PARAMETERLESS)
def test_buffers_of_a_head_move_in_copies_alone(make, tmp_path: Path) -> None:
    model = headed(make)
    before = base_state(model)
    config = deltaw.LoraConfig(target_modules=["up"], modules_to_save=["head"])
    deltaw.attach(model, config)
    x = 3 * torch.randn(8, 4) + 1
    for _ in range(3):
        model.train()(x)
    assert_same_state(base_state(model), before)
    fresh = headed(make).eval()
    assert not same_bits(model.eval()(x), fresh(x))
    deltaw.save(model, tmp_path)
    deltaw.load(fresh, tmp_path)
    assert same_bits(fresh(x), model(x))
    model.load_state_dict(before, assign=True)
    assert same_bits(fresh(x), model(x))
    deltaw.attach(model, config, "other")
    deltaw.activate(model, {"default": 0.5, "other": 0.5})
    model.train()(x)
    deltaw.detach(model)
    assert_same_state(dict(model.state_dict()), before)
