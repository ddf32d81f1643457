"""Models whose weights accelerate offloads, before or after an adapter is attached."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.models import shake
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig, fitting
from deltaw.adapters import lora
from deltaw.errors import FormatError, MergeError, StateError

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402

TOKENS = torch.tensor([[1, 5, 0, 12], [7, 0, 3, 3]])
FULL = LoraConfig(
    r=2,
    target_modules=["table", "first", "second"],
    bias="all",
    modules_to_save=["norm", "head"],
)
PLAIN = LoraConfig(r=3, target_modules=["first"])
BIASED = LoraConfig(r=3, target_modules=["first"], lora_bias=True)
BOTH_ORDERS = pytest.mark.parametrize("first", ["attach", "offload"])


class Tokens(nn.Module):
    """Embedding, two layers, and a head with a normalisation that counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 6)
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.table(ids).mean(1)))
        return self.head(self.norm(self.second(x)))


def offload(model: nn.Module, **options: object) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), **options)


def adapted(config: LoraConfig = FULL, seed: int = 1) -> Tokens:
    """Return a model with an adapter that changes everything it can."""
    model = Tokens().eval()
    deltaw.attach(model, config)
    shake(model, seed=seed)
    return model


def offloaded(first: str, *configs: LoraConfig) -> tuple[Tokens, Tokens]:
    """Return twins with the same adapters a0, a1, ..., of which the second is offloaded."""
    here, there = Tokens().eval(), Tokens().eval()
    states = [deltaw.capture(adapted(config, seed)) for seed, config in enumerate(configs)]
    if first == "offload":
        offload(there)
    for model in (here, there):
        for number, state in enumerate(states):
            deltaw.attach(model, state, f"a{number}")
    if first == "attach":
        offload(there)
    return here, there


@BOTH_ORDERS
@pytest.mark.parametrize(
    "configs", [(FULL,), (PLAIN, PLAIN), (BIASED,), (FULL, BIASED, PLAIN), (FULL, FULL)]
)
def test_an_offloaded_model_gives_the_same_outputs(
    first: str, configs: tuple[LoraConfig, ...]
) -> None:
    here, there = offloaded(first, *configs)
    mixture = {f"a{number}": 0.5 for number in range(len(configs))}
    for which in (*mixture, mixture, None):
        deltaw.activate(here, which)
        deltaw.activate(there, which)
        assert torch.equal(there(TOKENS), here(TOKENS))
        str(there)
    deltaw.activate(there, "a0")
    with pytest.raises(MergeError, match="meta device"):
        deltaw.merge(there)


@BOTH_ORDERS
def test_removing_the_hooks_and_detaching_gives_the_base_back(first: str) -> None:
    base = Tokens()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    here, there = offloaded(first, FULL, PLAIN)
    for model in (here, there):
        model.train()(TOKENS)
        model.eval()
    remove_hook_from_submodules(there)
    assert torch.equal(there(TOKENS), here(TOKENS))
    assert deltaw.summary(there).trainable == deltaw.summary(here).trainable
    deltaw.detach(there)
    assert type(there.head) is nn.Linear and "forward" not in vars(there.head)
    assert {name: p.requires_grad for name, p in there.named_parameters()} == flags
    for name, tensor in base.state_dict().items():
        assert torch.equal(there.state_dict()[name], tensor)


@BOTH_ORDERS
def test_an_offloaded_adapter_is_saved_with_the_mark_of_its_base(
    first: str, tmp_path: Path
) -> None:
    here, there = offloaded(first, FULL)
    for name, model in (("here", here), ("there", there)):
        deltaw.save(model, tmp_path / name, "a0")
    for file in ("adapter_model.safetensors", "deltaw.json"):
        written = (tmp_path / "there" / file).read_bytes()
        assert written == (tmp_path / "here" / file).read_bytes()
    assert json.loads(written)["base"]


def test_an_offloaded_base_that_is_another_is_refused(tmp_path: Path) -> None:
    deltaw.save(adapted(), tmp_path)
    other = Tokens()
    torch.nn.init.normal_(other.first.weight)
    offload(other)
    with pytest.raises(FormatError, match="other weights"):
        deltaw.load(other, tmp_path)


@BOTH_ORDERS
@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_swapping_an_offloaded_adapter_takes_effect(
    first: str, config: LoraConfig, tmp_path: Path
) -> None:
    new = adapted(config, seed=8)
    deltaw.save(new, tmp_path)
    _, there = offloaded(first, config)
    old = there(TOKENS)
    deltaw.load(there, tmp_path, "a0", swap=True)
    assert torch.equal(there(TOKENS), new(TOKENS)) and not torch.equal(new(TOKENS), old)
    remove_hook_from_submodules(there)
    assert torch.equal(there(TOKENS), new(TOKENS))


def test_adapters_of_an_offloaded_base_train_and_offloaded_ones_are_refused() -> None:
    _, trains = offloaded("offload", FULL)
    deltaw.verify(trains, TOKENS)
    frozen = [p for n, p in trains.named_parameters() if ".adapter." not in n]
    assert not any(p.requires_grad for p in frozen)
    _, cannot = offloaded("attach", PLAIN)
    with pytest.raises(StateError, match=r"first.weight \(a0\)[^-]*offload first and attach then"):
        deltaw.verify(cannot, TOKENS)


def test_a_new_adapter_of_an_offloaded_model_starts_from_the_values_on_disk(tmp_path: Path) -> None:
    here, there = Tokens().eval(), Tokens().eval()
    places = dict.fromkeys(("table", "first", "second", "norm"), "disk") | {"head": "cpu"}
    accelerate.dispatch_model(there, places, main_device="cpu", offload_dir=tmp_path / "weights")
    for model in (here, there):
        deltaw.attach(model, FULL, generator=torch.Generator().manual_seed(2))
    assert there.norm.weight.is_meta
    assert torch.equal(there(TOKENS), here(TOKENS))
    for model, name in ((here, "a"), (there, "b")):
        deltaw.save(model, tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_placing_an_adapted_model_keeps_the_base_apart_from_its_copies() -> None:
    base, model = Tokens(), adapted()
    places = dict.fromkeys(("table", "first", "second", "norm", "head"), "cpu")
    accelerate.dispatch_model(model, places, force_hooks=True)
    model.train()(TOKENS)
    remove_hook_from_submodules(model)
    deltaw.detach(model)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Tokens()
    deltaw.attach(model, FULL)
    with pytest.raises(FormatError, match=r"'weight.lora_A' holds no values: it is on the meta"):
        deltaw.save(model, tmp_path / "a")
    with pytest.raises(StateError, match="hold no values"):
        deltaw.verify(model, TOKENS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_blocks_that_are_loaded_as_one_take_adapters_before_but_not_after() -> None:
    model = nn.Sequential(Tokens().eval())
    offload(model, preload_module_classes=["Tokens"])
    with pytest.raises(StateError, match=r"as a whole.*\n  - 0\n.*preload_module_classes"):
        deltaw.attach(model, FULL)
    assert type(model) is nn.Sequential
    here = nn.Sequential(adapted())
    expected = here(TOKENS)
    offload(here, preload_module_classes=["Tokens"])
    assert torch.equal(here(TOKENS), expected)


def test_what_fails_while_an_adapter_is_built_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Tokens()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    build: Callable[..., nn.Module] = lora.build
    calls: list[object] = []

    def once(parts: object) -> nn.Module:
        calls.append(parts)
        if len(calls) > 1:
            raise MemoryError
        return build(parts)

    monkeypatch.setattr(lora, "build", once)
    with pytest.raises(MemoryError):
        deltaw.attach(model, FULL)
    assert type(model) is Tokens and type(model.table) is nn.Embedding
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_nearest_modules_are_looked_up_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(fitting, "nearest", lambda name, _: looked.append(name) or "")
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(60)})
    deltaw.attach(model, LoraConfig(r=1))
    with pytest.raises(FormatError, match="layer59: there is no such module"):
        deltaw.attach(Tokens(), deltaw.capture(model))
    assert looked == [f"layer{i}" for i in range(20)]
