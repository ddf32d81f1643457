"""`deltaw inspect` on what is damaged, moved or asked for in vain."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tests.train.conftest import Command

from deltaw.train.recipe import parse
from deltaw.train.run import train


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


def scaled(model: Path, copy: Path) -> Path:
    """A copy of `model` whose weights are ten times as large."""
    shutil.copytree(model, copy)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    larger = {name: tensor * 10 for name, tensor in tensors.items()}
    safetensors.torch.save_file(larger, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("what", ["run", "run/adapter_model.safetensors"])
def test_shares_are_those_of_the_adapters_own_base_only(
    deltaw_command: Command, run: Path, tiny: Path, tmp_path: Path, what: str
) -> None:
    other = scaled(tiny / "model", tmp_path / "other")
    code, out, err = deltaw_command("inspect", tmp_path / what, "--model", other)
    assert code == 1
    assert "ΔW/W\n" not in out
    assert "not those that this run was trained on" in err or "trained on other weights" in err
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99)
    transformers.GPT2Model(gpt2).save_pretrained(tmp_path / "gpt2")
    code, out, err = deltaw_command("inspect", tmp_path / what, "--model", tmp_path / "gpt2")
    assert code == 1
    assert "not those that this run was trained on" in err or "there is no such module" in err
    code, out, err = deltaw_command("inspect", tmp_path / what, "--model", tiny / "model")
    assert (code, err) == (0, "")
    assert "ΔW/W\n" in out


def test_a_base_that_changed_in_its_place_is_said_and_an_adapter_alone_has_none(
    deltaw_command: Command, run: Path, tiny: Path, tmp_path: Path
) -> None:
    recipe = (run / "recipe.yaml").read_text("utf-8")
    other = scaled(tiny / "model", tmp_path / "other")
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny / "model"), str(other)), "utf-8")
    code, out, err = deltaw_command("inspect", run)
    assert (code, err) == (0, "")
    assert f"base      The weights of {other} are not those that this run was trained on." in out
    assert "ΔW/W\n" not in out
    code, out, err = deltaw_command("inspect", run / "adapter_model.safetensors")
    assert (code, err) == (0, "")
    assert "base      not given; --model BASE shows ΔW/W" in out


def test_an_adapter_without_a_low_rank_has_no_rank(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    values = {"model": tiny / "model", "data": tiny / "data.csv", "output": tmp_path / "head"}
    recipe = parse({key: str(value) for key, value in values.items()} | {"method": "head"})
    train(recipe.model_copy(update={"max_steps": 1}), silent=True)
    code, out, err = deltaw_command("inspect", tmp_path / "head")
    assert (code, err) == (0, "")
    assert "0 adapted layers, 51 parameters" in out
    assert "lora_alpha" not in out


def test_a_run_that_lost_its_adapter_is_an_error(deltaw_command: Command, run: Path) -> None:
    (run / "adapter_config.json").unlink()
    code, _, err = deltaw_command("inspect", run)
    assert code == 1
    assert f"{run} has lost its adapter_config.json.\nFix: restore the file" in err


@pytest.mark.parametrize("pooler", ["absent", "untouched"])
def test_a_model_is_planned_as_it_would_be_trained(
    deltaw_command: Command, tiny: Path, tmp_path: Path, pooler: str
) -> None:
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    if pooler == "absent":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    else:
        tensors["pooler.dense.bias"].zero_()
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, out, err = deltaw_command("inspect", model)
    assert (code, err) == (0, "")
    assert "12 linear layers" in out
    assert "bert.pooler was never trained, so that `deltaw train` trains it in full" in out
    received = deltaw_command("train", model, tiny / "data.csv", "--dry-run", "-o", tmp_path / "x")
    assert "12 x linear at r=8" in received[1]
    code, out, err = deltaw_command("inspect", tiny / "model")
    assert "13 linear layers" in out
    assert "never trained" not in out
    (model / "model.safetensors").write_bytes(b"cut")
    code, _, err = deltaw_command("inspect", model)
    assert code == 1
    assert "cannot be loaded" in err


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
