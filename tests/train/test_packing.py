"""Runs on packed weights, from the command line."""

import importlib.util
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.train.conftest import Command

from deltaw.errors import ConfigError
from deltaw.train import yamlfile
from deltaw.train.recipe import parse

BASE = {"model": "m", "data": "d"}


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not importlib.util.find_spec(package), reason=f"package absent: {package}"
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param(["--quantization-bit", "4"], "nf4", marks=missing("bitsandbytes")),
        pytest.param(
            ["--quantization-bit", "4", "--quantization-type", "fp4", "double_quantization=false"],
            "fp4",
            marks=[missing("bitsandbytes"), pytest.mark.slow],
        ),
        pytest.param(
            ["--quantization-bit", "8"],
            "int8",
            marks=[missing("bitsandbytes"), pytest.mark.slow],
        ),
        pytest.param(
            ["--quantization-bit", "8", "--quantization-method", "torchao"],
            "torchao-int8",
            marks=missing("torchao"),
        ),
    ],
)
def test_a_run_on_packed_weights(
    options: list[str], kind: str, tiny: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    """It trains, is recorded, predicts again from its folder alone, and merges to a plain model."""
    run = tmp_path / "run"
    code, out, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", run, "--max-steps", "20", "--lr", "0.02",
        *options,
    )  # fmt: skip
    assert code == 0, err
    assert f" in {kind}" in out
    assert yamlfile.read(run / "recipe.yaml")["quantization_bit"] == int(options[1])
    scores = json.loads((run / "results.json").read_text())
    assert scores["after"]["values"]["accuracy"] > scores["before"]["values"]["accuracy"]
    code, out, err = deltaw_command("predict", run, "please refund order 7 now")
    assert code == 0, err
    assert {line.split()[0] for line in out.splitlines()} == {"refund", "cancel", "ship"}
    code, out, err = deltaw_command("eval", run)
    assert code == 0, err
    assert "adapter beside packed weights" in out
    assert f"{scores['after']['values']['accuracy']:.3f}" in out
    code, out, err = deltaw_command("merge", run, tmp_path / "plain")
    assert code == 0, err
    assert "largest difference of logits" in out


@missing("bitsandbytes")
@pytest.mark.parametrize("options", [["query"], ["method=head"]])
def test_layers_without_an_adapter_are_packed_or_unpacked_too(
    options: list[str], tiny: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    options = ["--targets", "query"] if options == ["query"] else options
    code, _, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", tmp_path / "run", "--max-steps", "2",
        "--quantization-bit", "4", *options,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = deltaw_command("merge", tmp_path / "run", tmp_path / "plain")
    assert code == 0, err
    assert "largest difference of logits" in out
    held = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert not any("absmax" in name or "quant" in name for name in held)
    code, out, err = deltaw_command("merge", tmp_path / "run", tmp_path / "packed", "--requantize")
    assert code == 0, err
    assert "largest difference of logits" in out and "in nf4 again, which moves" in out
    held = safetensors.torch.load_file(tmp_path / "packed" / "model.safetensors")
    assert held["bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.uint8


UNREAD = {
    "full": ({"quantization_bit": 4, "method": "full"}, "quantization_bit=4 has no effect"),
    "type": ({"quantization_type": "fp4"}, "only with quantization_bit; leave"),
    "torchao": (
        {"quantization_bit": 8, "quantization_method": "torchao", "double_quantization": False},
        "double_quantization=False has no effect, only with quantization_bit=4 and",
    ),
    "bf16": ({"quantization_bit": 8, "bf16": True}, "bf16=True would round the biases"),
    "bits": ({"quantization_bit": 3}, "quantization_bit=3"),
    "synonym": ({"load_in_4bit": True}, "did you mean quantization_bit"),
    "nothing": (
        {"quantization_bit": 4, "absorb": True},
        "absorb=True has no effect with init_lora_weights=True",
    ),
    "eva": ({"absorb": True, "init_lora_weights": "eva"}, "whose B0 A0 is zero; leave it out"),
    "loftq": (
        {"quantization_bit": 4, "init_lora_weights": "loftq"},
        "init_lora_weights='loftq' makes up for packing: it needs",
    ),
    "dense": ({"absorb": True, "init_lora_weights": "loftq"}, "it needs quantization_bit and"),
    "scales": (
        {
            "quantization_bit": 4,
            "absorb": True,
            "init_lora_weights": "pissa",
            "double_quantization": False,
        },
        "double_quantization=False does not go with absorb",
    ),
    "head": (
        {"method": "head", "quantization_bit": 4, "absorb": True},
        "absorb=True has no effect with method=head",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_settings_that_make_no_sense(name: str) -> None:
    values, message = UNREAD[name]
    with pytest.raises(ConfigError, match=message):
        parse(BASE | values)
