"""`deltaw inspect` on what is damaged, moved or asked for in vain."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.train.conftest import Command


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_nan_and_dead_layers_are_named_and_nan_is_an_error(
    deltaw_command: Command, run: Path
) -> None:
    file = run / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    first, second, *_ = sorted(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[first][0, 0] = float("nan")
    tensors[second].zero_()
    head = next(name for name in tensors if name.endswith("classifier.bias"))
    tensors[head][0] = float("inf")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    broken, dead = (
        name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        for name in (first, second)
    )
    code, out, err = deltaw_command("inspect", run)
    assert code == 1
    assert "13 adapted layers" in out
    assert f"dead (ΔW is zero): {dead}\n" in out
    assert f"NaN or Inf in: {broken}, classifier.bias\n" in out
    assert "not finite" in err
    assert f"  - {broken}\n  - classifier.bias\n" in err


def test_a_run_without_its_base_is_shown_without_shares(
    deltaw_command: Command, run: Path, tiny: Path, tmp_path: Path
) -> None:
    recipe = (run / "recipe.yaml").read_text("utf-8")
    gone = tmp_path / "gone"
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny / "model"), str(gone)))
    code, out, err = deltaw_command("inspect", run)
    assert (code, err) == (0, "")
    assert f"no longer at {gone}" in out
    assert "say where it is now with --model" in out
    assert "13 adapted layers" in out
    assert "ΔW/W\n" not in out
    code, out, err = deltaw_command("inspect", run, "--model", tiny / "model")
    assert (code, err) == (0, "")
    assert "ΔW/W\n" in out
    code, _, err = deltaw_command("inspect", run, "--model", gone)
    assert code == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize("results", [[], {}, {"after": {"values": {"accuracy": 1.0}}}])
def test_damaged_results_are_one_error(deltaw_command: Command, run: Path, results: object) -> None:
    (run / "results.json").write_text(json.dumps(results))
    code, _, err = deltaw_command("inspect", run)
    assert code == 1
    assert err.startswith("error: ")
    assert "results.json is damaged" in err


def test_options_that_would_change_nothing_are_refused(
    deltaw_command: Command, run: Path, tiny: Path
) -> None:
    for arguments in (["--targets", "query"], ["--r", "0"], ["--r", "4", "--targets", "query"]):
        code, out, err = deltaw_command("inspect", run, *arguments)
        assert (code, out) == (1, "")
        assert "this is a run" in err
        code, out, err = deltaw_command("inspect", run / "adapter_model.safetensors", *arguments)
        assert (code, out) == (1, "")
        assert "this is an adapter" in err
    code, out, err = deltaw_command("inspect", tiny / "model", "--model", tiny / "model")
    assert (code, out) == (1, "")
    assert "this is a model" in err


def test_nothing_from_an_adapter_reaches_the_terminal_unescaped(
    deltaw_command: Command, run: Path
) -> None:
    file = run / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": "\x1b[31mred\rline"}))
    tensors = safetensors.torch.load_file(run / "adapter_model.safetensors")
    tensors["\x1b[2Jstray"] = tensors.popitem()[1]
    safetensors.torch.save_file(tensors, run / "adapter_model.safetensors")
    code, out, err = deltaw_command("inspect", run)
    assert code == 1
    assert "\\x1b[31mred\\rline" in err
    assert not {"\x1b", "\r"} & set(out + err)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_without_code(deltaw_command: Command, run: Path) -> None:
    file = run / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"\x1bnew_setting": 3}))
    code, _, err = deltaw_command("inspect", run)
    assert code == 0
    assert err.startswith("warning: ")
    assert err.count("\n") == 1
    assert "new_setting" in err
    assert "\x1b" not in err


class Rude:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_pickle_that_would_run_code_is_refused_without_advice_to_run_it(
    deltaw_command: Command, run: Path
) -> None:
    (run / "adapter_model.safetensors").unlink()
    torch.save({"x": Rude()}, run / "adapter_model.bin")
    code, out, err = deltaw_command("inspect", run)
    assert (code, "ran" in out) == (1, False)
    assert "which deltaw never does" in err
    assert "weights_only" not in err
