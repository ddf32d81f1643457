"""Runs whose start is taken out of the weights, dense or packed, from the command line."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests.train.conftest import Command
from torch import nn

import deltaw
from deltaw.quant import storage_of
from deltaw.train import yamlfile
from deltaw.train.console import Console
from deltaw.train.opened import open_run
from deltaw.train.prepare import prepare
from deltaw.train.recipe import parse

bnb = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="package absent: bitsandbytes"
)
PACKED = ("quantization_bit=4", "absorb=true")
CASES = [
    pytest.param(("init_lora_weights=olora", "absorb=true"), "", id="dense"),
    pytest.param((*PACKED, "init_lora_weights=pissa"), "Bnb4", marks=bnb, id="qpissa"),
    pytest.param((*PACKED, "init_lora_weights=loftq_iter_2"), "Bnb4", marks=bnb, id="loftq"),
    pytest.param((*PACKED, "init_lora_weights=lora_ga"), "Bnb4", marks=bnb, id="lora_ga"),
    pytest.param(
        (
            *PACKED,
            "init_lora_weights=pissa",
            "use_dora=true",
            "use_rslora=true",
            "loraplus_lr_ratio=4",
        ),
        "Bnb4",
        marks=bnb,
        id="all at once",
    ),
]


def storages(model: nn.Module) -> list[str]:
    """How each of some layers is stored; an empty name for a dense one."""
    return [
        type(storage).__name__ if (storage := storage_of(module)) else ""
        for path, module in model.named_modules()
        if path.endswith(("query", "value", "key", "intermediate.dense"))
    ]


@pytest.mark.parametrize(("settings", "storage"), CASES)
def test_a_run_from_its_start_to_a_plain_model(
    settings: tuple[str, ...],
    storage: str,
    tiny: Path,
    tmp_path: Path,
    deltaw_command: Command,
) -> None:
    """What is opened again is packed alike and scores the same."""
    run = tmp_path / "run"
    options = ("--max-steps", "6", "--lr", "0.01", "--r", "4")
    code, out, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", run, *options, *settings
    )
    assert (code, err) == (0, "")
    assert "the start absorbed into the weights" in out
    assert "passed: every adapter runs" in out
    assert yamlfile.read(run / "recipe.yaml")["absorb"] is True
    model = open_run(run).model
    assert storages(model) == [storage] * 8
    with pytest.raises(deltaw.errors.StateError, match="absorbed into the weights"):
        deltaw.detach(model)
    scores = json.loads((run / "results.json").read_text())
    code, out, err = deltaw_command("eval", run)
    assert (code, err) == (0, "")
    assert f"{scores['after']['values']['accuracy']:.3f}" in out
    code, out, err = deltaw_command("predict", run, "please refund order 7 now")
    assert (code, err) == (0, "")
    code, out, err = deltaw_command("merge", run, tmp_path / "plain")
    assert (code, err) == (0, "")
    assert "largest difference of logits" in out


@bnb
def test_an_interrupted_run_starts_from_the_same_weights(tiny: Path) -> None:
    """The same recipe packs the same bits, which a checkpoint of A and B goes with.

    The layers that no adapter is on are packed too.
    """
    values = {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "init_lora_weights": "loftq",
        "quantization_bit": 4,
        "absorb": True,
        "max_steps": 3,
        "target_modules": ["query", "value"],
    }
    first, second = (prepare(parse(values), Console(silent=True)).model for _ in range(2))
    assert storages(first) == ["Bnb4"] * 8
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@bnb
def test_a_start_on_packed_weights_names_the_way(
    tiny: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    code, _, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", tmp_path / "run",
        "quantization_bit=4", "init_lora_weights=pissa",
    )  # fmt: skip
    assert code != 0
    assert "its weight is packed, as Bnb4" in err and "absorb=True" in err
