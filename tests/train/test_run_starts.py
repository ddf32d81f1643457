"""Starts other than the usual one, from the command line to the adapter's folder."""

from pathlib import Path

import pytest
from tests.train.conftest import Command

import deltaw
from deltaw.train.opened import open_run


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "lora_ga"])
def test_a_run_from_its_start_to_its_folder(
    init: str, deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = ("-o", output, "--max-steps", "3", "--r", "4", f"init_lora_weights={init}")
    code, out, err = deltaw_command("train", tiny / "model", tiny / "data.csv", *arguments)
    assert (code, err) == (0, "")
    assert "passed: every adapter runs" in out
    assert (output / "deltaw_start.safetensors").is_file() == (init != "eva")
    opened = open_run(output)
    state = deltaw.capture(opened.model)
    ranks = {
        len(layer.tensors["weight.lora_A"])
        for layer in state.layers.values()
        if layer.kind == "linear"
    }
    assert ranks == {8} if init != "eva" else max(ranks) <= 8
    code, out, err = deltaw_command("eval", output)
    assert (code, err) == (0, "")
    code, out, err = deltaw_command("inspect", output)
    assert (code, err) == (0, "")
