"""One error lists all that is wrong, and shows names from outside so that a terminal is safe."""

from pathlib import Path

import pytest
import torch
from core.models import Tower
from safetensors.torch import save_file

import deltaw
from deltaw.config import LoraConfig
from deltaw.errors import DataError, FormatError, TargetError, printable, raise_all
from deltaw.state import LayerState, State


def test_every_target_that_matches_nothing_is_listed() -> None:
    names = [f"gone_{number}" for number in range(60)]
    with pytest.raises(TargetError) as error:
        deltaw.plan(Tower(), LoraConfig(target_modules=names))
    assert all(f"'{name}'" in str(error.value) for name in names)


def test_every_layer_that_does_not_fit_is_listed() -> None:
    layers = {f"gone_{number}": LayerState("linear", {}) for number in range(60)}
    with pytest.raises(FormatError) as error:
        deltaw.attach(Tower(), State(LoraConfig(), layers))
    assert str(error.value).count("there is no such module") == 60


@pytest.mark.parametrize(("error", "most"), [(FormatError, 1000), (DataError, 20)])
def test_a_list_without_end_is_counted(error: type[Exception], most: int) -> None:
    with pytest.raises(error) as caught:
        raise_all(error, "Wrong:", [str(number) for number in range(most + 3)], "do this.")
    lines = str(caught.value).splitlines()
    assert len(lines) == most + 3
    assert lines[-3:] == [f"  - {most - 1}", "  ... and 3 more", "Fix: do this."]


def test_text_from_outside_is_one_printable_line() -> None:
    assert printable("größe\x1b[31m\n\u202e") == r"größe\x1b[31m\n\u202e"
    assert printable("a" * 90) == "a" * 79 + "…"


def test_a_factor_without_the_other_is_reported_once(tmp_path: Path) -> None:
    model = Tower()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["head"], modules_to_save=[]))
    deltaw.save(model, tmp_path)
    name = "base_model.model.head.lora_A.weight"
    for path in ("head", "gone"):
        tensors = {name.replace("head", path): torch.ones(2, 10)}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(FormatError) as error:
            deltaw.load(Tower(), tmp_path)
        assert str(error.value).count("lora_B") == 1
        assert ("no such module" in str(error.value)) == (path == "gone")
