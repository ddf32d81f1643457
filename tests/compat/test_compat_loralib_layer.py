"""The attributes of loralib's layers: read, written in place, assigned and reset as there."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import deltaw
from deltaw.compat import loralib as ours
from deltaw.errors import StateError

theirs = pytest.importorskip("loralib")


def linear(library: ModuleType, r: int = 2) -> nn.Module:
    return library.Linear(5, 7, r=r, lora_alpha=3, lora_dropout=0.5, merge_weights=False)


def merged_linear(library: ModuleType, r: int = 2) -> nn.Module:
    flags = [True, False, True]
    return library.MergedLinear(5, 12, r=r, lora_alpha=3, enable_lora=flags, merge_weights=False)


def embedding(library: ModuleType, r: int = 2) -> nn.Module:
    return library.Embedding(11, 6, r=r, lora_alpha=3, merge_weights=False)


def conv(library: ModuleType, r: int = 2) -> nn.Module:
    return library.Conv2d(4, 6, 3, r=r, lora_alpha=3, merge_weights=False)


LAYERS = [linear, merged_linear, embedding, conv]
Make = Callable[..., nn.Module]


@pytest.mark.parametrize("make", LAYERS)
def test_the_attributes_are_those_of_loralib(make: Make) -> None:
    for r in (2, 0):
        a, b = make(theirs, r), make(ours, r)
        for name in ("r", "lora_alpha", "merge_weights", "merged"):
            assert getattr(a, name) == getattr(b, name), name
        assert hasattr(a, "scaling") == hasattr(b, "scaling") == bool(r)
    a, b = make(theirs), make(ours)
    assert a.scaling == b.scaling
    torch.manual_seed(0)
    x = torch.ones(40)
    dropped = b.lora_dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, a.lora_dropout(x))
    for name in ("r", "lora_alpha", "scaling", "merged", "merge_weights"):
        with pytest.raises(AttributeError, match=name):
            setattr(b, name, 1)


@pytest.mark.parametrize("make", LAYERS)
def test_factors_are_written_in_place_as_in_loralib(make: Make) -> None:
    a, b = make(theirs), make(ours)
    for layer in (a, b):
        layer.train(False)
        nn.init.constant_(layer.lora_A, 0.5)
        values = torch.linspace(-1, 1, layer.lora_B.numel()).view_as(layer.lora_B)
        layer.lora_B.data.copy_(values)
        with torch.no_grad():
            layer.lora_B[0] = 2.0
    assert torch.equal(b.lora_A, torch.full_like(b.lora_A, 0.5))
    assert torch.equal(a.lora_B, b.lora_B)
    base = {n: t for n, t in a.state_dict().items() if "lora_" not in n}
    b.load_state_dict(base, strict=False)
    ids = torch.arange(11)
    x = {linear: torch.ones(2, 5), merged_linear: torch.ones(2, 5), embedding: ids}.get(
        make, torch.ones(1, 4, 5, 5)
    )
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)


def test_stacked_factors_are_the_slices_also_when_these_were_moved_or_copied() -> None:
    layer = merged_linear(ours)
    for other in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to(layer.weight.device)):
        for parameter in other.adapter.parameters():
            parameter.data = parameter.data.clone()
        first, again = other.lora_B, other.lora_B
        nn.init.ones_(first)
        slices = [p for n, p in other.named_parameters() if n.endswith("lora_B")]
        assert len(slices) == 2 and all((p == 1).all() for p in slices)
        assert torch.equal(again, torch.ones(8, 2))
        nn.init.zeros_(slices[1])
        assert torch.equal(other.lora_B[:4], torch.ones(4, 2)) and not other.lora_B[4:].any()
    assert torch.equal(other.state_dict()["lora_B"], other.lora_B)


def test_slices_train_after_their_stack_was_written_and_through_it() -> None:
    layer = merged_linear(ours)
    nn.init.ones_(layer.lora_B)
    nn.init.ones_(layer.lora_A)
    slices = [p for n, p in layer.named_parameters() if n.endswith("lora_B")]
    layer(torch.ones(2, 5)).sum().backward()
    assert all((p.grad == 15.0).all() for p in slices)
    optimizer = torch.optim.SGD(slices, lr=1.0)
    optimizer.step()
    assert torch.equal(layer.lora_B, torch.full((8, 2), -14.0))
    optimizer.zero_grad()
    (layer.lora_B**2).sum().backward()
    assert all((p.grad == -28.0).all() for p in slices)


def test_a_factor_is_assigned() -> None:
    layer = linear(ours)
    new = nn.Parameter(torch.ones(7, 2))
    layer.lora_B = new
    assert layer.lora_B is new and any(p is new for p in layer.parameters())
    with pytest.raises(TypeError, match="lora_B"):
        layer.lora_B = torch.ones(7, 2)
    with pytest.raises(AttributeError, match=r"slice_0_of_3\.lora_B, .*slice_2_of_3\.lora_B"):
        merged_linear(ours).lora_B = nn.Parameter(torch.ones(8, 2))
    with pytest.raises(AttributeError, match="r=0 or detached has no lora_A"):
        linear(ours, r=0).lora_A = new


@pytest.mark.parametrize("make", LAYERS)
def test_a_layer_is_reset_as_in_loralib(make: Make) -> None:
    a, b = make(theirs), make(ours)
    for layer in (a, b):
        with torch.no_grad():
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 9.0)
        torch.manual_seed(3)
        layer.reset_parameters()
    state = {name.removeprefix("conv."): tensor for name, tensor in a.state_dict().items()}
    for name, tensor in b.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_reset_forgets_the_fingerprint_and_waits_for_an_unmerge(tmp_path: Path) -> None:
    model = nn.Sequential(linear(ours))
    ours.mark_only_lora_as_trainable(model)
    deltaw.save(model, tmp_path / "a")
    model[0].reset_parameters()
    deltaw.save(model, tmp_path / "b")
    files = [(tmp_path / name / "deltaw.json").read_bytes() for name in "ab"]
    assert files[0] != files[1]
    with deltaw.merged(model):
        assert model[0].merged
        with pytest.raises(StateError, match="merged"):
            model[0].reset_parameters()
    assert not model[0].merged


def test_every_attribute_of_loralib_is_there() -> None:
    source = inspect.getsource(theirs.LoRALayer)
    names = {line.split("self.")[1].split()[0] for line in source.splitlines() if "self." in line}
    assert names == {"r", "lora_alpha", "lora_dropout", "merged", "merge_weights"}
    assert all(hasattr(ours.LoRALayer, name) for name in names)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_without_rank_takes_loralibs_checkpoint(groups: int) -> None:
    a = nn.Sequential(theirs.Conv2d(4, 6, 3, groups=groups))
    b = nn.Sequential(ours.Conv2d(4, 6, 3, groups=groups))
    b.load_state_dict(a.state_dict())
    x = torch.linspace(-1, 1, 200).view(2, 4, 5, 5)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("make", [linear, merged_linear])
def test_biases_of_layers_without_rank_are_trained_as_in_loralib_and_saved(make: Make) -> None:
    a, b = (nn.ModuleList([make(each, 0), linear(each)]) for each in (theirs, ours))
    theirs.mark_only_lora_as_trainable(a, "lora_only")
    ours.mark_only_lora_as_trainable(b, "lora_only")
    trained = {name for name, p in a.named_parameters() if p.requires_grad}
    assert trained == {"0.bias", "1.bias", "1.lora_A", "1.lora_B"}
    names = {
        n.replace("adapter.default.weight.", "") for n, p in b.named_parameters() if p.requires_grad
    }
    assert names == trained == ours.lora_state_dict(b, "lora_only").keys()


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_a_refused_cast_names_the_option_of_a_layer_built_by_hand(kind: str) -> None:
    sizes = (4, 6, 3) if kind == "Conv2d" else (4, 6)
    options = {"enable_lora": [True, False]} if kind == "MergedLinear" else {}
    layer = getattr(ours, kind)(*sizes, r=2, **options)
    with pytest.raises(StateError, match=r"take dtype=torch\.float16 where they are built"):
        nn.Sequential(layer).half()
    cast = getattr(ours, kind)(*sizes, r=2, **options, dtype=torch.float16)
    assert cast.weight.dtype == torch.float16 and cast.lora_A.dtype == torch.float32
