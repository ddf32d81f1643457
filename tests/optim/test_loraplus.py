"""LoRA+: PEFT's grouping, the rates of the paper, any optimiser class, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as pefts_own
from tests.core.models import TOKENS, Tower, shake
from tests.core.tiny import bert, llama
from torch import nn
from torch.optim import Optimizer

import deltaw
from deltaw.compat import peft as compat
from deltaw.errors import ConfigError, StateError
from deltaw.optim import loraplus

TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
RATES = {"lr": 2e-3, "loraplus_lr_ratio": 12.0, "loraplus_lr_embedding": 3e-5}


def settings(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """The rate and the decay of each parameter by id."""
    return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found = settings(groups)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def tower() -> Tower:
    """Low-rank adapters with a bias on B, biases and a head in full, and one on an embedding."""
    model = Tower()
    config = deltaw.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj"],
        modules_to_save=["head"],
        bias="all",
        lora_bias=True,
    )
    deltaw.attach(model, config)
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["embed"]), "table")
    deltaw.activate(model, {"default": 1.0, "table": 1.0})
    shake(model)
    return model


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_low_rank_factors_are_grouped_as_peft_groups_them(decay: float) -> None:
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS}
    tuned = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    theirs = pefts_own(tuned, torch.optim.AdamW, loraplus_weight_decay=decay, **RATES)
    model = llama()
    deltaw.attach(model, deltaw.LoraConfig(**options))
    groups = loraplus.groups(model, loraplus_weight_decay=decay, **RATES)

    def key(name: str) -> str:
        name = name.replace("base_model.model.", "").replace("lora_embedding_", "lora_")
        path, _, factor = name.partition(".lora_")
        return f"{path.removesuffix('.adapter.default.weight')}.{factor[0]}"

    wanted = {key(name): found for name, found in by_name(tuned, theirs.param_groups).items()}
    assert {key(name): found for name, found in by_name(model, groups).items()} == wanted
    assert {rate for rate, _ in wanted.values()} == {2e-3, 2e-3 * 12, 3e-5}


def test_every_kind_of_tensor_has_the_rate_and_decay_of_its_kind() -> None:
    model = tower()
    found = by_name(model, loraplus.groups(model, 1e-3, 16, 2e-6, 0.1))
    assert len(found) > 20
    for name, (rate, decay) in found.items():
        path, _, tensor = name.partition(".adapter.")
        slot, kind = tensor.split(".")[1:]
        if kind == "trained":
            assert (rate, decay) == (1e-3, 0.1 if path == "head" and slot == "weight" else 0), name
        elif path == "embed":
            assert (rate, decay) == (2e-6, 0.1), name
        else:
            wanted = {"lora_A": (1e-3, 0.1), "lora_B": (1.6e-2, 0.1), "lora_B_bias": (1.6e-2, 0)}
            assert (rate, decay) == wanted[kind], name


def test_a_step_moves_b_by_the_ratio_times_its_gradient() -> None:
    model = tower()
    optimizer = loraplus.create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4, loraplus_lr_embedding=0.5
    )
    model(TOKENS).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            embedded = name.startswith("embed.")
            rate = 0.5 if embedded else 0.01 * (4 if ".lora_B" in name else 1)
            assert p.grad is not None
            torch.testing.assert_close(p.detach(), before[name] - rate * p.grad, rtol=0, atol=1e-6)
        else:
            assert torch.equal(p, before[name])


def test_only_what_is_trained_is_in_the_groups() -> None:
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["q_proj"]), "a")
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["v_proj"]), "b")
    for name, p in model.named_parameters():
        p.requires_grad_(".adapter.b." in name)
    names = by_name(model, loraplus.groups(model, 1e-3, 4))
    assert len(names) == 6
    assert all(".adapter.b." in name for name in names)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_any_optimiser_that_takes_groups(kind: type[Optimizer], options: dict[str, Any]) -> None:
    model = tower()
    optimizer = loraplus.create_loraplus_optimizer(
        model, kind, lr=1e-3, loraplus_lr_ratio=8, **options
    )
    assert type(optimizer) is kind
    assert all(optimizer.defaults[name] == value for name, value in options.items())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model(TOKENS).square().sum().backward()
    optimizer.step()
    schedule.step()
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 4e-3, 5e-7}
    after = [p for p in model.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 20


class TensorsOnly(torch.optim.SGD):
    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__([p.detach() for p in params], lr)


class OneRate(torch.optim.SGD):
    def __init__(self, params: list[dict[str, Any]], lr: float) -> None:
        super().__init__([p for group in params for p in group["params"]], lr)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.LBFGS, {}, "LBFGS cannot be built .*doesn't support per-parameter options"),
        (TensorsOnly, {}, "TensorsOnly cannot be built .*'detach'"),
        (OneRate, {}, "OneRate cannot be built .*rates \\[0.001\\] instead of \\["),
        (torch.optim.AdamW, {"bettas": 1}, "AdamW cannot be built .*bettas"),
        (torch.optim.AdamW, {"eps": -1.0}, "AdamW cannot be built .*Invalid epsilon"),
    ],
)
def test_what_takes_no_groups_is_one_error(
    kind: Callable[..., Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*Fix: use an optimiser that takes"):
        loraplus.create_loraplus_optimizer(tower(), kind, lr=1e-3, loraplus_lr_ratio=8, **options)


def test_numbers_out_of_range_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        loraplus.groups(tower(), -1, math.nan, "fast")  # type: ignore[arg-type]
    for text in (
        "lr must be a number above 0, got -1",
        "loraplus_lr_ratio must be a number above 0, got nan",
        "loraplus_lr_embedding must be a number above 0, got 'fast'",
    ):
        assert text in str(caught.value)


def test_a_model_without_a_trained_b_is_refused() -> None:
    with pytest.raises(StateError, match="No B of an adapter on BertForSequenceClassification"):
        loraplus.groups(bert(), 1e-3, 16)
    model = bert()
    deltaw.attach(model, deltaw.LoraConfig(target_modules=[], bias="all"))
    with pytest.raises(StateError, match=r"Fix: call deltaw\.attach first"):
        loraplus.groups(model, 1e-3, 16)


def test_pefts_name_leads_here() -> None:
    assert compat.create_loraplus_optimizer is loraplus.create_loraplus_optimizer
    assert loraplus.create_loraplus_optimizer.__name__ == pefts_own.__name__


def test_a_decay_that_groups_would_override_is_refused() -> None:
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2))
    made = {"lr": 1e-3, "loraplus_lr_ratio": 4.0}
    with pytest.raises(ConfigError, match="Fix: give loraplus_weight_decay"):
        loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, **made, weight_decay=0.1)
    both = {"weight_decay": 0.1, "loraplus_weight_decay": 0.1}
    optimizer = loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, **made, **both)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
