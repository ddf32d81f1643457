"""Runs of language models become plain models, of their own base alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language.models import make_model
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM

from deltaw.export import hf
from deltaw.export._source import open_source
from deltaw.language.choosing import train
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


def test_a_language_models_merge_is_checked_without_the_rounding_of_inputs(
    values: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    run = train(parse(values | {"quantization_bit": 8, "output": str(tmp_path / "run")}))
    assert not hf._rounds_inputs(open_source(run))


def test_a_run_of_the_weights_themselves_is_copied_and_checked(
    values: dict[str, Any], tmp_path: Path, deltaw_command: Command
) -> None:
    run = tmp_path / "run"
    places = [values["model"], values["data"], "max_steps=2", "samples=0"]
    _, out, _ = deltaw_command("train", *places, "--method", "full", "-o", run)
    assert out.splitlines()[-1].strip() == f"deltaw merge {run} OUT"
    code, _, err = deltaw_command("merge", run, tmp_path / "out", "--model", values["model"])
    assert code == 1 and "--model has no effect" in err
    code, out, err = deltaw_command("merge", run, tmp_path / "out")
    assert code == 0, err
    assert f"copied    {run} -> {tmp_path / 'out'}" in out and "probe tokens: 0.0e+00" in out
    ours, copy = (AutoModelForCausalLM.from_pretrained(at) for at in (run, tmp_path / "out"))
    assert all(torch.equal(w, copy.state_dict()[name]) for name, w in ours.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    code, _, err = deltaw_command("merge", run, tmp_path / "out")
    assert code == 1 and "is not empty" in err
