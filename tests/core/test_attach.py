"""Attaching, switching, detaching: what people see of it, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from core.models import TOKENS, Tower, shake
from torch import nn

import deltaw
from deltaw import LayerState, LoraConfig, State
from deltaw.attaching import attach_state
from deltaw.errors import ConfigError, FormatError, StateError
from deltaw.layer import AdaptedLayer

CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "embed"])


def test_layers_stay_what_they_are() -> None:
    model = Tower()
    keys = list(model.state_dict())
    layer = model.layers[0].attn.q_proj
    deltaw.attach(model, CONFIG)
    assert model.layers[0].attn.q_proj is layer and isinstance(layer, nn.Linear)
    assert isinstance(model, Tower) and type(model).__name__ == "Tower"
    added = [key for key in model.state_dict() if key not in keys]
    assert keys == [key for key in model.state_dict() if key in keys]
    assert added[:2] == [
        "embed.adapter.default.weight.lora_A",
        "embed.adapter.default.weight.lora_B",
    ]


def test_only_adapters_train_and_detach_gives_the_flags_back() -> None:
    model = Tower()
    model.head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    deltaw.attach(model, CONFIG)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapter." in n
    }
    deltaw.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_frozen_adapter_does_not_train() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_seed_alone_decides_the_start() -> None:
    states = []
    for other in (0, 1):
        model = Tower()
        torch.manual_seed(other)
        if other:
            deltaw.attach(model, LoraConfig(r=2, target_modules=["v_proj"]), "first")
        deltaw.attach(model, CONFIG, generator=torch.Generator().manual_seed(7))
        states.append(deltaw.capture(model))
    for path, layer in states[0].layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(tensor, states[1].layers[path].tensors[key])


def test_the_first_adapter_is_active_and_later_ones_wait() -> None:
    model = Tower().eval()
    base = model(TOKENS)
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj", "head"]), "b")
    shake(model)
    assert deltaw.active(model) == {"a": 1.0} and list(deltaw.configs(model)) == ["a", "b"]
    only_a = model(TOKENS)
    deltaw.activate(model, "b")
    only_b = model(TOKENS)
    deltaw.activate(model, {"a": 1.0, "b": 1.0})
    both = model(TOKENS)
    assert not torch.equal(only_a, only_b) and not torch.equal(both, only_a)
    deltaw.activate(model, {"a": 0.0, "b": 1.0})
    assert torch.allclose(model(TOKENS), only_b, atol=1e-6)
    deltaw.activate(model, None)
    assert torch.equal(model(TOKENS), base)


def test_deleting_one_leaves_the_others_alone() -> None:
    model = Tower().eval()
    base = model(TOKENS)
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj", "head"]), "b")
    shake(model)
    only_a = model(TOKENS)
    deltaw.detach(model, "b")
    assert torch.equal(model(TOKENS), only_a) and type(model.head) is nn.Linear
    assert not any(
        "b" in layer.adapter for layer in model.modules() if isinstance(layer, AdaptedLayer)
    )
    deltaw.detach(model, "a")
    assert torch.equal(model(TOKENS), base) and type(model) is Tower


def test_heads_and_biases_are_trained_beside_the_frozen_originals() -> None:
    model = Tower()
    original = {name: p.clone() for name, p in model.named_parameters()}
    deltaw.attach(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"], bias="all")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in original:
            assert torch.equal(parameter, original[name])
    assert not torch.equal(model.head.weight, original["head.weight"])
    assert not torch.equal(model.layers[0].norm.bias, original["layers.0.norm.bias"])
    with deltaw.disabled(model):
        assert torch.equal(model.head.weight, original["head.weight"])
    deltaw.activate(model, {"default": 0.5})
    halfway = (original["head.weight"] + model.head.adapter["default"]["weight"].trained) / 2
    assert torch.allclose(model.head.weight, halfway, atol=1e-7)


def test_tied_heads_trained_in_full_stay_tied() -> None:
    model = Tower()
    other = nn.Linear(10, 3)
    model.second = other
    other.weight = model.head.weight
    deltaw.attach(
        model, LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["head", "second"])
    )
    assert (
        model.head.adapter["default"]["weight"].trained
        is other.adapter["default"]["weight"].trained
    )


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a.b", "a b", "-a", "keys", "forward", "x" * 101, None, "ü", "a\n"],
)
def test_names_must_be_plain(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be an adapter's name"):
        deltaw.attach(Tower(), CONFIG, name)


def test_attaching_twice_under_one_name_is_refused() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError, match="an adapter 'default' already"):
        deltaw.attach(model, CONFIG)


def test_data_parallel_is_refused_before_and_after() -> None:
    model = nn.Sequential(Tower())
    with pytest.raises(StateError, match="Cannot attach to a DataParallel"):
        deltaw.attach(nn.DataParallel(model), CONFIG)
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError, match="DataParallel copies the model"):
        torch.nn.parallel.replicate(
            model, ["meta"]
        ) if False else model._replicate_for_data_parallel()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_an_adapted_model_is_refused_whole(cast: str) -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError, match="attach again"):
        getattr(model, cast)()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(StateError, match="attach again"):
        getattr(model.layers[0].attn.q_proj.adapter, cast)()
    assert model.to("cpu") is model and model.float() is model


def test_an_unknown_init_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gaussian, kaiming"):
        deltaw.attach(Tower(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pisa"))


def test_an_optimizer_built_before_attach_is_noticed_at_its_first_step() -> None:
    model = Tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    deltaw.attach(model, CONFIG)
    model(TOKENS).sum().backward()
    with pytest.raises(StateError, match="built before attach"):
        optimizer.step()
    with pytest.raises(StateError, match="built before attach"):
        deltaw.verify(model, TOKENS, optimizer=optimizer)
    other = torch.optim.SGD(Tower().parameters(), lr=0.1)
    other.step()


def test_unknown_adapters_are_named() -> None:
    model = Tower()
    with pytest.raises(StateError, match="has no adapters"):
        deltaw.activate(model, "a")
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError) as caught:
        deltaw.activate(model, {"a": 1.0, "default": float("nan"), "c": 2.0})
    assert all(part in str(caught.value) for part in ("'a'", "'c'", "nan", "are: default"))
    for call in (deltaw.detach, deltaw.capture):
        with pytest.raises(StateError, match="Adapters: default"):
            call(model, "b")


def test_an_instance_level_forward_is_refused() -> None:
    model = Tower()
    model.head.forward = lambda x: x
    with pytest.raises(Exception, match="head: an instance-level `forward`"):
        deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]))
    assert type(model) is Tower


def test_a_layer_with_our_names_is_refused() -> None:
    model = Tower()
    model.head.act = "relu"
    with pytest.raises(Exception, match="head: Linear has its own act"):
        deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]))


def test_a_state_that_does_not_fit_lists_every_shape() -> None:
    model = Tower()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj", "head", "o_proj"]))
    state = deltaw.capture(model)
    other = Tower()
    other.head = nn.Linear(10, 4)
    other.layers[1].attn.q_proj = nn.Linear(9, 6)
    del other.layers[2]
    with pytest.raises(FormatError) as caught:
        deltaw.attach(other, state)
    text = str(caught.value)
    for part in (
        "head lora_B: the file has (3, 2), the model needs (4, 2)",
        "layers.1.attn.q_proj lora_A: the file has (2, 10), the model needs (2, 9)",
        "layers.2.attn.q_proj: there is no such module",
        "layers.2.attn.o_proj: there is no such module",
    ):
        assert part in text
    assert type(other) is Tower


def test_switching_between_forward_and_backward_raises_under_checkpointing() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, CONFIG, "b")
    block = model.layers[0]
    x = torch.randn(2, 10, requires_grad=True)
    for reentrant in (True, False):
        deltaw.activate(model, "a")
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        deltaw.activate(model, "b")
        with pytest.raises(StateError, match="Other adapters are active in the backward"):
            y.sum().backward()
        deltaw.activate(model, "a")
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        with deltaw.disabled(model), torch.no_grad():
            block(x)
        y.sum().backward()


def test_loralibs_conv_factors_read_without_a_rank_get_their_scale() -> None:
    """Its rows are r k, so whoever takes them for the rank has a scale k times too small."""
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    A, B = torch.randn(2 * 3, 4 * 3), torch.randn(6 * 3, 2 * 3)
    scale = 5 / 2
    state = State(LoraConfig(), {"0": LayerState("linear", factors(A, B), scale=5 / 6)})
    x = torch.randn(2, 4, 7, 7)
    W = conv[0].weight + scale * (B @ A).view(conv[0].weight.shape)
    expected = nn.functional.conv2d(x, W, conv[0].bias)
    deltaw.attach(conv, state)
    assert torch.allclose(conv(x), expected, atol=1e-4)


def test_a_weight_both_adapted_and_trained_in_full_is_refused() -> None:
    tensors = {
        **factors(torch.randn(2, 10), torch.randn(3, 2)),
        "weight.trained": torch.ones(3, 10),
    }
    with pytest.raises(FormatError, match="head: its weight is adapted and trained in full"):
        deltaw.attach(Tower(), State(LoraConfig(), {"head": LayerState("linear", tensors)}))


def test_a_state_without_a_partner_says_which() -> None:
    state = State(
        LoraConfig(), {"head": LayerState("linear", {"weight.lora_A": torch.ones(2, 10)})}
    )
    with pytest.raises(FormatError, match=r"head: weight.lora_B is missing"):
        deltaw.attach(Tower(), state)


def factors(A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight.lora_A": A, "weight.lora_B": B}


def test_tensors_of_a_fresh_state_are_never_shared() -> None:
    """A file may hold one tensor for several slots; trained, they must go apart."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    A = torch.ones(2, 4)
    both = torch.zeros(2, 6, 2)
    layers = {
        "0": LayerState("linear", {"weight.lora_A": A, "weight.lora_B": both[0]}),
        "1": LayerState("linear", {"weight.lora_A": A, "weight.lora_B": both[1]}),
    }
    state = State(LoraConfig(r=2, target_modules=["0", "1"]), layers)
    attach_state(model, state, "default", trainable=True, fresh=True)
    factors = [p for p in model.parameters() if p.requires_grad]
    assert len({p.untyped_storage().data_ptr() for p in factors}) == 4
    assert factors[0].data_ptr() == A.data_ptr()


def test_activating_visits_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tower()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj"]), "second")
    deltaw.activate(model, "second")
    visited: list[str] = []
    for name in ("modules", "named_modules", "children", "named_children", "parameters", "apply"):
        monkeypatch.setattr(nn.Module, name, lambda self, *_, name=name: visited.append(name))
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: visited.append(name))
    monkeypatch.setattr(nn.Parameter, "requires_grad_", lambda *_: visited.append("flag"))
    deltaw.activate(model, "default")
    deltaw.activate(model, {"default": 0.5, "second": 2})
    assert deltaw.active(model) == {"default": 0.5, "second": 2.0}
    assert visited == []


def test_an_adapter_beside_others_waits_although_none_is_active() -> None:
    model = Tower().eval()
    base = model(TOKENS)
    deltaw.attach(model, CONFIG, "a")
    deltaw.activate(model, None)
    deltaw.attach(model, CONFIG, "b")
    shake(model)
    assert deltaw.active(model) == {} and torch.equal(model(TOKENS), base)
    deltaw.detach(model, "a")
    assert deltaw.active(model) == {}
    deltaw.detach(model)
    deltaw.attach(model, CONFIG, "c")
    assert deltaw.active(model) == {"c": 1.0}


def test_what_an_adapted_class_builds_is_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ReLU())
    deltaw.attach(model, LoraConfig(r=2, target_modules=["0", "1"]))
    shake(model)
    part = model[:2]
    assert type(part) is nn.Sequential and list(part) == list(model)[:2]
    x = torch.ones(4, 4)
    assert torch.equal(part(x), model[1](model[0](x)))
    other = type(model[0])(4, 3, bias=False)
    assert type(other) is nn.Linear and other.weight.shape == (3, 4) and other.bias is None
    assert type(type(model[1])(4, 2, kernel_size=1)) is nn.Conv1d
    assert type(copy.deepcopy(model)) is type(model)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("folder", r"deltaw\.load\(model"),
        (Path("folder"), r"deltaw\.load\(model"),
        ({"r": 4}, r"LoraConfig\(\*\*"),
        (peft.LoraConfig(r=4), r"get_peft_model from deltaw\.compat\.peft"),
    ],
)
def test_a_source_of_another_type_says_what_takes_it(source: object, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"attach takes a(.|\n)*Fix: .*{fix}"):
        deltaw.attach(Tower(), source)  # type: ignore[arg-type]


def test_rows_take_names_from_any_sequence() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG, "a")
    shake(model)
    with torch.no_grad(), deltaw.rows(model, np.array(["a", "a"])):
        rows = model(TOKENS)
    assert torch.equal(rows, model(TOKENS))
