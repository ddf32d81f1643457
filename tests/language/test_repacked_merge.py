"""Runs on packed weights become models that are packed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.language.choosing import train
from deltaw.language.use.opened import open_language
from deltaw.quant import storage_of
from deltaw.train.recipe import parse

pytest.importorskip("bitsandbytes")
LAYER = "model.layers.0.mlp.up_proj"
PACKINGS = {
    "nf4": {"quantization_bit": 4},
    "fp4-single": {
        "quantization_bit": 4,
        "quantization_type": "fp4",
        "double_quantization": False,
    },
    "nf4-bf16": {"quantization_bit": 4, "bf16": True},
    "int8": {"quantization_bit": 8},
    "qpissa": {"quantization_bit": 4, "absorb": True, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module", params=PACKINGS)
def packed(
    request: pytest.FixtureRequest, talker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps on packed weights."""
    values: dict[str, Any] = {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "max_steps": 2,
        "samples": 0,
        "learning_rate": 0.05,
        "output": str(tmp_path_factory.mktemp("packed") / "run"),
    }
    return train(parse(values | PACKINGS[request.param]))


@torch.no_grad()
def test_a_packed_model_is_written_as_it_is_merged_in_memory(
    packed: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    out = tmp_path / "out"
    code, told, err = deltaw_command("merge", packed, out, "--requantize")
    assert code == 0, err
    kind = told.split("LlamaForCausalLM in ")[1].split()[0]
    assert f"in {kind} again, which moves these answers by up to " in " ".join(told.split())

    merged = open_language(packed).model
    deltaw.merge(merged, original="none", requantize=True)
    deltaw.detach(merged)
    written = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    deltaw.prepare_quantized(written)
    layer, other = merged.get_submodule(LAYER), written.get_submodule(LAYER)
    storage = storage_of(other)
    assert storage is not None and storage_of(layer) is storage
    torch.testing.assert_close(storage.read(other), storage.read(layer), rtol=0, atol=0)
    ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    outputs = [model.eval()(input_ids=ids).logits.float() for model in (merged, written)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)

    stored = load_file(out / "model.safetensors")
    assert stored[f"{LAYER}.weight"].dtype in (torch.uint8, torch.int8)
    assert not any("lora" in name for name in stored)


@pytest.mark.parametrize("packed", ["nf4"], indirect=True)
def test_what_cannot_be_packed_again_is_refused(
    packed: Path, talker: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    out = tmp_path / "out"
    code, _, err = deltaw_command("merge", packed, out, "--requantize", "--dtype", "float32")
    assert code == 1 and "leave --requantize or --dtype out" in err
    code, _, err = deltaw_command("export", packed, out, "--to", "peft", "--requantize")
    assert code == 1 and "requantize is for hf, not for peft" in err
    values = {"model": str(talker / "model"), "data": str(talker / "data.json"), "samples": 0}
    plain = train(parse(values | {"max_steps": 1, "output": str(tmp_path / "plain")}))
    code, _, err = deltaw_command("merge", plain, out, "--requantize")
    assert (
        code == 1 and "--requantize has no effect: the weights that were trained on are not" in err
    )
    assert not out.exists()
