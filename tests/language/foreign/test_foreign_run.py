"""Files of other trainers through the command line, up to the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.language.use.opened import open_language
from deltaw.train.runfolder import read_recipe

LAYERWISE = {
    "finetuning_type": "full",
    "use_galore": True,
    "galore_layerwise": True,
    "gradient_accumulation_steps": 1,
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_target")),
}


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def factory(talker: Path, tmp_path: Path) -> dict[str, Any]:
    info = {"colours": {"file_name": "data.json"}}
    (talker / "dataset_info.json").write_text(json.dumps(info))
    return {
        "model_name_or_path": str(talker / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 6,
        "lora_target": "q_proj,v_proj",
        "dataset": "colours",
        "dataset_dir": str(talker),
        "template": "alpaca",
        "cutoff_len": 96,
        "output_dir": str(tmp_path / "run"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": "1e-2",
        "max_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "plot_loss": True,
    }


def test_a_dry_run_shows_what_the_file_becomes(
    deltaw_command: Command, factory: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path, factory | {"val_size": 4, "trust_remote_code": True})
    code, out, err = deltaw_command("train", file, "lora_rank=2", "--lr", "3e-3", "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("recipe    LLaMA-Factory's, read as: model=")
    for text in (
        "plot_loss=True",
        "overwrite_output_dir deletes nothing",
        "trust_remote_code: Python code that comes with the model is run",
        "colours: 24 rows, 20 training, 4 validation",
        "4 x linear at r=2 (q_proj, v_proj)",
        "template  alpaca (asked for)",
        "3 of 4 rows",
        "0.003, cosine after 1 warm-up step",
        "max_length: 96",
        "keep: last",
    ):
        assert text in out, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "more", "expected"),
    [
        ([], {}, (4, 8)),
        (["--processes", "2"], {}, (2, 4)),
        ([], LAYERWISE, (1, 2)),
        (["batch_size=6", "--processes", "3"], {}, (3, 6)),
    ],
)
def test_rows_of_each_process_are_multiplied_by_those_that_are_started(
    deltaw_command: Command,
    factory: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    more: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    """On four GPUs, of which layerwise GaLore is for one."""
    started = []

    def launch(count: int, target: Any, options: dict[str, Any]) -> int:
        started.append((count, options["recipe"].batch_size))
        return 0

    def run(recipe: Any, **_: Any) -> None:
        started.append((1, recipe.batch_size))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("deltaw.cli.train.launch", launch)
    monkeypatch.setattr("deltaw.language.choosing.train", run)
    code, _, err = deltaw_command("train", written(tmp_path, factory | more), *asked)
    assert (code, err) == (0, "")
    assert started == [expected]


def test_errors_name_the_file_and_write_nothing(
    deltaw_command: Command, factory: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path, factory | {"stage": "ppo"})
    code, _, err = deltaw_command("train", file)
    assert code == 1
    assert err.splitlines()[0] == f"error: The recipe from {file} cannot be used:"
    assert "stage=ppo is not there yet" in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_kept_and_its_last_state_is_the_result(
    deltaw_command: Command, factory: dict[str, Any], tmp_path: Path
) -> None:
    more = {
        "val_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "gradient_accumulation_steps": 1,
        "seed": 0,
    }
    file = written(tmp_path, factory | more)
    code, out, err = deltaw_command("train", file)
    assert (code, err) == (0, "")
    assert "but the best state was chosen by them" not in out
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["values"]["loss"] > results["best_validation"] + 1e-4
    assert "LLaMA-Factory's, read as" in (run / "log.jsonl").read_text()
    recipe = read_recipe(run)
    assert (recipe.keep, recipe.warmup, recipe.validation_share) == ("last", 0, 4)
    code, _, err = deltaw_command("train", file)
    assert code == 1 and "holds a finished run" in err
    output = tmp_path / "best"
    code, out, _ = deltaw_command("train", file, "load_best_model_at_end=true", "-o", output)
    assert code == 0 and "but the best state was chosen by them" in out
    best = json.loads((output / "results.json").read_text())
    assert best["best_validation"] == results["best_validation"]
    assert best["after"]["values"]["loss"] == pytest.approx(best["best_validation"], abs=1e-5)


def test_axolotl_through_the_command_line(
    deltaw_command: Command, talker: Path, tmp_path: Path
) -> None:
    values = {
        "base_model": str(talker / "model"),
        "adapter": "lora",
        "lora_r": 2,
        "lora_target_linear": True,
        "datasets": [{"path": str(talker / "data.json"), "type": "alpaca"}],
        "sequence_len": 128,
        "learning_rate": 0.001,
        "output_dir": str(tmp_path / "run"),
    }
    code, out, err = deltaw_command("train", written(tmp_path, values), "--dry-run")
    assert (code, err) == (0, "")
    assert "recipe    axolotl's, read as: " in out
    assert "14 x linear at r=2" in out


def test_the_last_layers_of_mlx_are_adapted(
    deltaw_command: Command, talker: Path, tmp_path: Path
) -> None:
    values = {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "num_layers": 1,
        "iters": 2,
        "max_seq_length": 128,
        "adapter_path": str(tmp_path / "run"),
    }
    code, out, err = deltaw_command("train", written(tmp_path, values), "--dry-run")
    assert (code, err) == (0, "")
    assert "7 x linear at r=8" in out
    assert "learnt: everything, questions too" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_example_of_llamafactory_trains_an_adapter_for_peft(
    deltaw_command: Command, shared: Path, tmp_path: Path
) -> None:
    model, output = shared / "models/stories260K/hf", tmp_path / "saves"
    file = tmp_path / "stories_lora_sft.yaml"
    file.write_text(
        f"""### model
model_name_or_path: {model}
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
dataset_dir: {shared / "data/llamafactory_demo"}
template: default
cutoff_len: 256
max_samples: 12
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: {output}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-2
num_train_epochs: 3.0
max_steps: 2
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
    )
    code, _, err = deltaw_command("train", file)
    assert (code, err) == (0, "")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), output).eval()
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, len(config.target_modules)) == (8, 16, 7)
    ids = AutoTokenizer.from_pretrained(output)("Once upon a time", return_tensors="pt")
    ours = open_language(output)
    with torch.no_grad():
        ours_logits = ours.model.eval()(**ids)["logits"]
        torch.testing.assert_close(ours_logits, theirs(**ids)["logits"], rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(**ids)["logits"] - ours_logits).abs().max() > 0.1
