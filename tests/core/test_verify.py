"""`verify` finds adapters that train nothing or change nothing, and leaves no trace."""

import pytest
import torch
from core.models import TOKENS, Tower, shake
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deltaw
from deltaw import LoraConfig
from deltaw.errors import StateError

CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "embed"], modules_to_save=["head"])


def test_a_sound_model_passes_and_is_left_as_it_was() -> None:
    model = nn.Sequential(Tower(), nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5))
    deltaw.attach(model, CONFIG)
    model[0].layers[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    deltaw.verify(model, TOKENS)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


class Past(nn.Module):
    """Reads a layer's weight past its forward when there are no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.outer(self.inner(x))
        return self.outer(nn.functional.linear(x, self.inner.weight, self.inner.bias))


class Unused(Past):
    """Never calls one of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


class Detached(Past):
    """Cuts the gradient between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).detach())


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Past(), r"inner.weight \(default\): its forward is not used without gradients"),
        (Unused(), r"inner.weight \(default\): its forward never ran in training"),
        (Detached(), r"inner.weight \(default\): lora_A got no gradient"),
    ],
)
def test_a_lost_adapter_is_named(model: nn.Module, problem: str) -> None:
    deltaw.attach(model, LoraConfig(r=2))
    with pytest.raises(StateError, match=problem) as caught:
        deltaw.verify(model, torch.randn(3, 4))
    assert "outer" not in str(caught.value)


def test_an_optimizer_that_misses_a_parameter_is_named() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "embed" not in n]
    with pytest.raises(StateError, match=r"embed.weight \(default\): the optimiser does not hold"):
        deltaw.verify(model, TOKENS, optimizer=torch.optim.AdamW(trained))


def test_only_active_adapters_are_checked() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, CONFIG, "b")
    deltaw.activate(model, {"a": 1.0, "b": 0.5})
    shake(model)
    deltaw.verify(model, TOKENS)


def test_a_batch_may_be_a_mapping_a_tuple_or_a_tensor() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    for batch in (TOKENS, (TOKENS,), {"x": TOKENS}):
        deltaw.verify(model, batch)


def test_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(StateError, match="has no adapters"):
        deltaw.verify(Tower(), TOKENS)


def test_adapters_that_cannot_train_now_say_what_to_do() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG, "a", trainable=False)
    with pytest.raises(
        StateError, match=r"No active adapter is trainable[^.]*.\nFix: .*trainable=True"
    ):
        deltaw.verify(model, TOKENS)
    deltaw.attach(model, CONFIG, "b")
    deltaw.activate(model, "b")
    deltaw.verify(model, TOKENS)
    deltaw.activate(model, None)
    with pytest.raises(StateError, match=r"No adapter is active[^.]*.\nFix: call deltaw.activate"):
        deltaw.verify(model, TOKENS)
    deltaw.activate(model, "b")
    with deltaw.disabled(model), pytest.raises(StateError, match="No adapter is active"):
        deltaw.verify(model, TOKENS)


def test_a_loss_that_no_adapter_reaches_is_named() -> None:
    class Scored(Tower):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x).sum().detach()}

    model = Scored()
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError, match="No output of the model depends on a trainable"):
        deltaw.verify(model, TOKENS)


def test_batches_of_a_data_loader_are_lists_of_arguments() -> None:
    loader = DataLoader(TensorDataset(TOKENS), batch_size=2)
    model = Tower()
    config = LoraConfig(r=2, init_lora_weights="eva", target_modules=["q_proj"])
    deltaw.attach(model, config, data=loader)
    deltaw.verify(model, next(iter(loader)))
