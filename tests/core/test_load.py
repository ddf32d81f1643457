"""Reading adapters onto models: what is checked, and swapping one while others stay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from core.models import TOKENS, Tower, shake
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import deltaw
from deltaw import LayerState, LoraConfig, State
from deltaw.errors import FormatError, StateError
from deltaw.loading import load

CONFIG = LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=["q_proj", "embed"],
    modules_to_save=["head"],
    bias="lora_only",
)


def saved(folder: Path, config: LoraConfig = CONFIG, seed: int = 1) -> torch.Tensor:
    """Save an adapter of the tower and return the output it gives."""
    model = Tower().eval()
    deltaw.attach(model, config)
    shake(model, seed=seed)
    deltaw.save(model, folder)
    output: torch.Tensor = model(TOKENS)
    return output


def test_a_loaded_adapter_gives_the_same_output(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = Tower().eval()
    load(model, tmp_path)
    assert torch.equal(model(TOKENS), expected)
    assert not any(p.requires_grad for p in model.parameters())
    load(model, tmp_path, "b", trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapter.b." in n
    }


def test_an_adapter_of_another_base_is_refused_by_its_bits(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Tower(seed=3)
    with pytest.raises(FormatError, match="the same shapes but other weights"):
        load(other, tmp_path)
    assert type(other) is Tower
    load(other, tmp_path, check_base=False)


def test_a_new_head_may_differ_since_it_is_replaced(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = Tower().eval()
    torch.nn.init.normal_(model.head.weight)
    load(model, tmp_path)
    assert torch.equal(model(TOKENS), expected)


def test_a_base_in_another_dtype_is_taken(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = Tower().eval().to(torch.float64)
    load(model, tmp_path)
    assert torch.allclose(model(TOKENS), expected.double(), atol=1e-5)


def test_another_architecture_lists_the_shapes(tmp_path: Path) -> None:
    saved(tmp_path)
    model = Tower()
    model.embed = torch.nn.Embedding(14, 10)
    del model.layers[2]
    with pytest.raises(FormatError) as caught:
        load(model, tmp_path)
    assert "embed lora_A: the file has (3, 13), the model needs (3, 14)" in str(caught.value)
    assert "layers.2.attn.q_proj: there is no such module" in str(caught.value)
    assert type(model) is Tower


def test_what_is_not_there_or_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="There is no adapter at"):
        load(Tower(), tmp_path / "gone")
    with pytest.raises(FormatError, match="no adapter in a known format"):
        load(Tower(), tmp_path)
    with pytest.raises(FormatError, match="There is no format 'zip'"):
        load(Tower(), tmp_path, format="zip")


def test_loading_on_a_merged_model_or_a_taken_name_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = Tower()
    load(model, tmp_path)
    with pytest.raises(StateError, match="already"):
        load(model, tmp_path)
    deltaw.merge(model)
    with pytest.raises(StateError, match="unmerge"):
        load(model, tmp_path, "b")
    with pytest.raises(StateError, match="no adapter 'c' to swap"):
        load(model, tmp_path, "c", swap=True)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "embed"], modules_to_save=["head"]),
        LoraConfig(r=4, target_modules=["v_proj"]),
    ],
)
def test_swapping_equals_a_fresh_load(config: LoraConfig, tmp_path: Path) -> None:
    saved(tmp_path / "old")
    saved(tmp_path / "other", LoraConfig(r=2, target_modules=["k_proj"]), seed=5)
    expected = saved(tmp_path / "new", config, seed=2)
    model = Tower().eval()
    load(model, tmp_path / "old", "a")
    load(model, tmp_path / "other", "b")
    load(model, tmp_path / "new", "a", swap=True)
    assert torch.equal(model(TOKENS), expected)
    assert list(deltaw.configs(model)) == ["a", "b"] and deltaw.active(model) == {"a": 1.0}
    deltaw.activate(model, {"a": 0.5, "b": 2.0})
    load(model, tmp_path / "old", "a", swap=True)
    assert deltaw.active(model) == {"a": 0.5, "b": 2.0}
    deltaw.detach(model)
    assert type(model) is Tower


def grouped(seed: int, spanning: bool) -> nn.Sequential:
    """Return a grouped convolution with an adapter of either form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    A = {"weight.lora_A": torch.ones(2, 4 if spanning else 2, 3, 3) * seed}
    B = {"weight.lora_B": torch.ones(6, 1 if spanning else 2)}
    state = LayerState("conv", {**A, **B}, groups=2)
    deltaw.attach(model, State(LoraConfig(r=2, target_modules=["0"]), {"0": state}))
    return model


@pytest.mark.parametrize("spanning", [True, False])
def test_a_sole_adapter_is_swapped_for_one_of_another_form(spanning: bool, tmp_path: Path) -> None:
    new, model = grouped(1, spanning), grouped(2, not spanning)
    deltaw.save(new, tmp_path)
    load(model, tmp_path, swap=True)
    image = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(image), new(image))
    deltaw.detach(model)
    assert type(model[0]) is nn.Conv2d


def test_adapters_of_two_forms_on_one_layer_are_refused(tmp_path: Path) -> None:
    deltaw.save(grouped(1, True), tmp_path)
    model = grouped(2, False)
    deltaw.attach(model, deltaw.capture(model), "b")
    image = torch.randn(2, 4, 5, 5)
    before = model(image)
    for name, staying in (("c", "default, b"), ("b", "default")):
        with pytest.raises(StateError, match=rf"- 0: {staying}\n.*detach\(model, name\)"):
            load(model, tmp_path, name, swap=name == "b")
    assert torch.equal(model(image), before) and list(deltaw.configs(model)) == ["default", "b"]


def test_any_name_is_free_while_another_adapter_is_swapped(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    expected = saved(tmp_path / "new", LoraConfig(r=4, target_modules=["v_proj"]))
    model = Tower().eval()
    load(model, tmp_path / "old", "a")
    load(model, tmp_path / "old", "a__swapped")
    load(model, tmp_path / "new", "a", swap=True)
    assert torch.equal(model(TOKENS), expected)
    assert list(deltaw.configs(model)) == ["a", "a__swapped"]


def test_swapping_equal_shapes_compiles_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    expected = saved(tmp_path / "new", seed=2)
    model = Tower().eval()
    load(model, tmp_path / "old")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(TOKENS)
        load(model, tmp_path / "new", swap=True)
        assert torch.allclose(compiled(TOKENS), expected, atol=1e-6)
    assert counter.frame_count == 1


def test_saving_in_a_merged_state_writes_the_adapter(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = Tower().eval()
    load(model, tmp_path)
    with deltaw.merged(model):
        deltaw.save(model, tmp_path / "again")
    first = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == first
    fresh = Tower().eval()
    load(fresh, tmp_path / "again")
    assert torch.equal(fresh(TOKENS), expected)


def test_a_base_from_a_folder_is_no_name_on_the_hub_wherever_the_adapter_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    model, other, far = Tower(), Tower(), Tower()
    model.name_or_path, far.name_or_path = "model", "owner/model"
    deltaw.attach(model, CONFIG)
    deltaw.attach(other, replace(CONFIG, base_model_name_or_path="model"))
    deltaw.attach(far, CONFIG)
    monkeypatch.chdir("/")
    named = []
    for each in (model, other, far):
        deltaw.save(each, tmp_path / "saved")
        content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        named.append(content["base_model_name_or_path"])
    assert named == [None, None, "owner/model"]
    [config] = deltaw.configs(model).values()
    assert config.base_model_name_or_path == str((tmp_path / "model").resolve())
