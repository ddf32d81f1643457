"""What `LoraConfig` takes from other libraries, and what it names as wrong."""

import json
from pathlib import Path

import pytest
from core.models import TOKENS, Tower, shake

import deltaw
from deltaw import LoraConfig
from deltaw.errors import ConfigError, StateError

numpy = pytest.importorskip("numpy")


@pytest.mark.parametrize("wrong", [None, 5, [1], {1: 4}, b"x", numpy.array([1, 2])])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_table_maps_names(name: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must map patterns to values, got "):
        LoraConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [5, [1], {"a": 4}, b"x", numpy.array([1, 2])])
@pytest.mark.parametrize(
    "name",
    ["base_model_name_or_path", "revision", "task_type", "bias", "method", "init_lora_weights"],
)
def test_a_name_is_text(name: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a name, got "):
        LoraConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [5, "x", {"q": 5}, {1: [True]}, numpy.array([1, 2])])
def test_flags_of_slices_are_lists(wrong: object) -> None:
    with pytest.raises(ConfigError, match="enable_lora"):
        LoraConfig(enable_lora=wrong)


def test_numbers_of_numpy_and_paths_are_taken_and_written(tmp_path: Path) -> None:
    theirs = LoraConfig(
        r=numpy.int64(4),
        lora_alpha=numpy.float32(0.5),
        lora_dropout=numpy.float16(0.25),
        rank_pattern={"q_proj": numpy.uint8(2)},
        alpha_pattern={"q_proj": numpy.float64(3)},
        layers_to_transform={numpy.int32(1), numpy.int32(0)},
        base_model_name_or_path=Path("base"),
    )
    ours = LoraConfig(
        r=4,
        lora_alpha=0.5,
        lora_dropout=0.25,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3.0},
        layers_to_transform=[0, 1],
        base_model_name_or_path="base",
    )
    assert theirs == ours and repr(theirs) == repr(ours)
    model = Tower()
    deltaw.attach(model, theirs)
    deltaw.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    for wrong in (numpy.float64(4), numpy.int64(0), numpy.bool_(True)):
        with pytest.raises(ConfigError, match="r must be a whole number above 0"):
            LoraConfig(r=wrong)


def test_weights_of_numpy_are_taken_and_wrong_ones_named() -> None:
    model = Tower().eval()
    deltaw.attach(model, LoraConfig(r=2))
    shake(model)
    deltaw.activate(model, {"default": 0.5})
    expected = model(TOKENS)
    deltaw.activate(model, {"default": numpy.float32(0.5)})
    assert model(TOKENS).equal(expected)
    assert deltaw.active(model) == {"default": 0.5}
    for wrong in (numpy.float32("nan"), "1", 1j):
        with pytest.raises(StateError, match=r"the weight of 'default' is .*\nFix: give finite"):
            deltaw.activate(model, {"default": wrong})
