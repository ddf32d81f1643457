"""Runs of language models become plain models, of their own base alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.language.models import make_model
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM

from deltaw.export import export
from deltaw.language.choosing import train
from deltaw.language.use.opened import open_language
from deltaw.quant import storage_of
from deltaw.train.recipe import parse


@pytest.fixture(scope="module")
def values(talker: Path) -> dict[str, Any]:
    """A recipe of two steps."""
    places = {"model": str(talker / "model"), "data": str(talker / "data.json")}
    return {**places, "max_steps": 2, "samples": 0, "learning_rate": 0.05}


def changed(folder: Path) -> Path:
    """Save the model of `talker` with other weights."""
    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def test_another_base_is_refused_whatever_the_dtype(
    values: dict[str, Any], tmp_path: Path, deltaw_command: Command
) -> None:
    run = train(parse(values | {"bf16": True, "output": str(tmp_path / "run")}))
    other = changed(tmp_path / "other")
    code, _, err = deltaw_command("merge", run, tmp_path / "wrong", "--model", other)
    assert code == 1 and "are not those that this run was trained on" in err
    assert not (tmp_path / "wrong").exists()
    code, out, err = deltaw_command("merge", run, tmp_path / "merged")
    assert code == 0 and "in float32" in out, err


@pytest.fixture(scope="module")
def packed(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on weights packed in nf4."""
    pytest.importorskip("bitsandbytes")
    output = tmp_path_factory.mktemp("packed") / "run"
    return train(parse(values | {"quantization_bit": 4, "output": str(output)}))


@torch.no_grad()
def difference(run: Path, out: Path) -> float:
    """The largest difference of the logits of a run, opened as for a chat, and of a folder's."""
    model = open_language(run).model
    ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return (model(input_ids=ids).logits.float() - plain(input_ids=ids).logits).abs().max().item()


@pytest.mark.parametrize(
    ("command", "most"),
    [
        (("merge",), 1e-5),
        (("merge", "--dtype", "bfloat16"), 0.01),
        (("export", "--to", "hf"), 1e-5),
        (("export", "--to", "ollama"), 1e-5),
        (("export", "--to", "hf", "--dtype", "bfloat16"), 0.01),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, tuple) else "",
)
def test_what_was_trained_on_packed_weights_is_what_is_written(
    packed: Path, tmp_path: Path, deltaw_command: Command, command: tuple[str, ...], most: float
) -> None:
    code, out, err = deltaw_command(command[0], packed, tmp_path / "out", *command[1:])
    assert code == 0, err
    assert difference(packed, tmp_path / "out") <= most
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = torch.bfloat16 if "bfloat16" in command else torch.float32
    assert {tensor.dtype for tensor in written.values()} == {wanted}
    assert not any("absmax" in name or "quant" in name for name in written)
    assert "trained" not in [line.split()[0] for line in out.splitlines()]


def test_a_run_in_bfloat16_is_merged_in_what_its_base_is_stored_in(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """The bits that are packed are those of weights in bfloat16."""
    pytest.importorskip("bitsandbytes")
    settings = {"quantization_bit": 4, "bf16": True, "output": str(tmp_path / "run")}
    run = train(parse(values | settings))
    told = export(run, tmp_path / "out", to="hf")
    assert "in float32" in told["written"]
    assert difference(run, tmp_path / "out") <= 0.05
    kept = open_language(run).model.model.layers[0].mlp.up_proj
    W = storage_of(kept).read(kept).double()
    adapter = kept.adapter["default"]["weight"]
    W += adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(merged.double(), W, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_bit": 8},
        {"quantization_bit": 4, "absorb": True, "init_lora_weights": "pissa"},
    ],
    ids=["int8", "qpissa"],
)
def test_other_packed_runs_are_opened_as_they_were_trained(
    values: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    run = train(parse(values | settings | {"output": str(tmp_path / "run")}))
    export(run, tmp_path / "out", to="hf")
    assert difference(run, tmp_path / "out") <= (0.1 if settings["quantization_bit"] == 8 else 1e-5)


def test_an_adapter_kept_apart_says_what_it_was_trained_on(
    packed: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    told = export(packed, tmp_path / "apart", to="vllm")
    assert told["trained"].startswith("on a base packed in nf4: ") and "--to hf" in told["trained"]
    plain = train(parse(values | {"output": str(tmp_path / "plain")}))
    assert "trained" not in export(plain, tmp_path / "dense", to="vllm")


def test_a_run_of_the_weights_themselves_is_copied_and_checked(
    values: dict[str, Any], tmp_path: Path, deltaw_command: Command
) -> None:
    run = tmp_path / "run"
    places = [values["model"], values["data"], "max_steps=2", "samples=0"]
    _, out, _ = deltaw_command("train", *places, "--method", "full", "-o", run)
    assert out.splitlines()[-1].strip() == f"deltaw merge {run} OUT"
    code, _, err = deltaw_command("merge", run, tmp_path / "out", "--model", values["model"])
    assert code == 1 and "--model has no effect" in err
    code, _, err = deltaw_command("merge", run, tmp_path / "out", "--dtype", "bfloat16")
    assert code == 1 and "--dtype has no effect" in err
    both = ("--dtype", "bfloat16", "--requantize")
    code, _, err = deltaw_command("merge", run, tmp_path / "out", *both)
    assert code == 1 and "--dtype, --requantize have no effect" in err
    code, out, err = deltaw_command("merge", run, tmp_path / "out")
    assert code == 0, err
    assert f"copied    {run} -> {tmp_path / 'out'}" in out and "probe tokens: 0.0e+00" in out
    ours, copy = (AutoModelForCausalLM.from_pretrained(at) for at in (run, tmp_path / "out"))
    assert all(torch.equal(w, copy.state_dict()[name]) for name, w in ours.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    code, _, err = deltaw_command("merge", run, tmp_path / "out")
    assert code == 1 and "is not empty" in err
