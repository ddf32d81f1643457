"""Updates in the backward pass: the same steps, and gradients that do not outlive them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.tiny import llama
from torch import Tensor, nn

from deltaw.errors import StateError
from deltaw.optim import galore
from deltaw.optim.galore import GaLoreAdamW

TOKENS = torch.randint(0, 32, (3, 2, 9), generator=torch.Generator().manual_seed(0))


def optimizer_of(model: nn.Module, *, layerwise: bool) -> GaLoreAdamW:
    groups = galore.groups(model, rank=4, update_proj_gap=2, scale=1.0)
    return GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, layerwise=layerwise)


def train(model: nn.Module, optimizer: GaLoreAdamW, steps: int = 5) -> None:
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for step in range(steps):
        batch = TOKENS[step % len(TOKENS)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def checkpointed(model: Any) -> Any:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: llama(tie=True),
        lambda: llama(torch.bfloat16),
        lambda: checkpointed(llama()),
    ],
    ids=["plain", "tied", "bfloat16", "checkpointed"],
)
def test_the_same_weights_come_out(make: Callable[[], Any]) -> None:
    usual, at_once = make(), make()
    train(usual, optimizer_of(usual, layerwise=False))
    train(at_once, optimizer_of(at_once, layerwise=True))
    assert same(usual, at_once)
    assert not same(usual, make())


def test_at_most_two_layers_hold_gradients_at_a_time() -> None:
    """Summed at every hook, before and after the one that updates."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(12)))
    layer = sum(p.nbytes for p in model[0].parameters())
    live: list[int] = []

    def measure(_: Tensor) -> None:
        live.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    def hooked() -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(measure)

    hooked()
    optimizer = optimizer_of(model, layerwise=True)
    hooked()
    model(torch.randn(5, 20)).square().sum().backward()
    assert len(live) == 2 * 24
    assert 0 < max(live) <= 2 * layer
    assert live[-1] == 0
    live.clear()
    optimizer.close()
    model(torch.randn(5, 20)).square().sum().backward()
    assert max(live) == 12 * layer


def test_closing_brings_step_back() -> None:
    model = llama()
    optimizer = optimizer_of(model, layerwise=True)
    train(model, optimizer, 2)
    optimizer.close()
    optimizer.close()
    before = copy.deepcopy(model)
    model(input_ids=TOKENS[2], labels=TOKENS[2]).loss.backward()
    assert same(model, before)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not same(model, before)
    assert {state["step"] for state in optimizer.state.values()} == {3}


def test_one_optimiser_alone_updates_in_the_backward_pass() -> None:
    model = llama()
    first = optimizer_of(model, layerwise=True)
    with pytest.raises(StateError, match=r"Another optimiser updates(.|\n)*close\(\)"):
        optimizer_of(model, layerwise=True)
    first.close()
    second = optimizer_of(model, layerwise=True)
    model(input_ids=TOKENS[0], labels=TOKENS[0]).loss.backward()
    assert not first.state
    assert {s["step"] for s in second.state.values()} == {1}


def test_a_group_that_is_refused_leaves_no_hook_behind() -> None:
    W = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="no matrix"):
        GaLoreAdamW(
            [{"params": [W]}, {"params": [nn.Parameter(torch.ones(4))], "rank": 2}], layerwise=True
        )
    W.square().sum().backward()
    assert W.grad is not None


def test_a_group_added_later_and_frozen_parameters() -> None:
    first, later, frozen = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = GaLoreAdamW([first, frozen], layerwise=True)
    optimizer.add_param_group({"params": [later], "rank": 2, "lr": 0.5})
    (first * later * frozen).sum().backward()
    assert first.grad is None
    assert later.grad is None
    assert not torch.equal(later, torch.ones(4, 4))
    optimizer.close()


def test_a_loaded_state_goes_on_exactly_with_the_loaded_rate() -> None:
    model = llama()
    optimizer = optimizer_of(model, layerwise=True)
    train(model, optimizer, 3)
    again = copy.deepcopy(model)
    resumed = optimizer_of(again, layerwise=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.01 * 0.8**3)
    for trained in (model, again):
        trained(input_ids=TOKENS[1], labels=TOKENS[1]).loss.backward()
    assert same(model, again)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = llama()
    optimizer_of(model, layerwise=False)
    with pytest.raises(StateError, match=r"its own process alone(.|\n)*Fix: leave layerwise out"):
        optimizer_of(model, layerwise=True)
