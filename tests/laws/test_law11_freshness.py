"""Law 11: after a step of any AdamW, or a write to `.data`, the next forward is that of a fresh
model holding those tensors."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaw
from laws.building import adapted, base, loss, parts, run, same_bits
from laws.cases import CASES, Case
from laws.product import Setting
from laws.running import installed, over_cases

Change = Callable[[nn.Module, Setting], None]


def step(**options: object) -> Change:
    """One step of AdamW after two forwards."""

    def change(model: nn.Module, setting: Setting) -> None:
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(held, lr=0.05, **options)  # type: ignore[arg-type]
        loss(model.train(), setting).backward()
        optimizer.step()
        model.eval()

    return change


def data(model: nn.Module, setting: Setting) -> None:
    """A write that bumps no version counter."""
    for part in parts(model):
        for parameter in part.parameters():
            parameter.data.mul_(1.5)


def new_data(model: nn.Module, setting: Setting) -> None:
    """Another tensor under the same parameter."""
    for part in parts(model):
        for parameter in part.parameters():
            parameter.data = parameter.data + 0.25 * (parameter.data != 0)


def base_data(model: nn.Module, setting: Setting) -> None:
    """Also of the base itself."""
    for name, parameter in model.layer.named_parameters():
        if "weight" in name and "adapter" not in name:
            parameter.data.mul_(0.75)


def base_loads(model: nn.Module, setting: Setting) -> None:
    """A checkpoint of another base."""
    model.load_state_dict(copy.deepcopy(base(setting, seed=3).state_dict()), strict=True)


CHANGES: dict[str, Change] = {
    "loop": step(foreach=False),
    "foreach": step(foreach=True),
    "fused": step(fused=True),
    "data": data,
    "new data": new_data,
    "base data": base_data,
    "base checkpoint": base_loads,
}


def forward_is_fresh(setting: Setting, change: Change) -> None:
    """Whatever ran before, in evaluation and in training, without gradients and with them."""
    model = adapted(setting)
    old = run(model, setting)
    loss(model, setting)
    run(model.train(), setting)
    change(model.eval(), setting)
    fresh = base(setting)
    if not setting.case.packed:
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapter." not in k})
    deltaw.attach(fresh, deltaw.capture(model))
    new = run(model, setting)
    assert same_bits(new, run(fresh, setting))
    assert torch.equal(loss(model, setting), loss(fresh, setting))
    assert not torch.equal(new, old)


def has_effect(case: Case, change: str) -> bool:
    """Leave out the changes that the case undoes, full copies and tables that renormalise; and what
    nobody does to a packed weight."""
    return not change.startswith("base") or (
        case.form != "module" and case.name != "embedding-max-norm" and not case.packed
    )


@pytest.mark.parametrize(
    ("case", "change"),
    [installed(c, change, case=c) for c in CASES for change in CHANGES if has_effect(c, change)],
    ids=str,
)
def test_fresh(case: Case, change: str) -> None:
    forward_is_fresh(Setting(case, head=case.form == "config"), CHANGES[change])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_cases(lambda case: "-" not in case.name)
def test_fresh_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    """Where a cast of the masters could be kept too long."""
    forward_is_fresh(Setting(case, dtype=dtype), CHANGES["fused"])
    forward_is_fresh(Setting(case, dtype=dtype), CHANGES["data"])
