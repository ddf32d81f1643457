"""DeepSpeed's files beside those of trainers: the stage of ZeRO acts, the rest must be the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.foreign.foreign_files import AXOLOTL, FACTORY, TRL, recipe_of, said_of
from tests.language.foreign.test_foreign_run import factory, written
from tests.train.conftest import Command

from deltaw.errors import ConfigError
from deltaw.language.foreign.reading import read
from deltaw.language.foreign.tool import Around

__all__ = ["factory"]

AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
}


def settings(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "overlap_comm": True, "offload_param": {"device": "none"}}
    return AUTO | {"zero_optimization": zero} | more


@pytest.mark.parametrize("file", [FACTORY, AXOLOTL, TRL], ids=["llamafactory", "axolotl", "trl"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_becomes_fsdp_or_not(file: dict[str, Any], stage: int) -> None:
    asked = file | {"deepspeed": settings(stage)}
    assert recipe_of(asked).fsdp == (stage == 3)
    assert f"deepspeed: ZeRO stage {stage}; DeepSpeed is not used, " in said_of(asked)
    assert ("fsdp: true shares out the same" in said_of(asked)) == (stage == 3)


def test_a_file_lies_beside_the_other(
    deltaw_command: Command, factory: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(settings(3)))
    file = written(tmp_path, factory | {"deepspeed": "ds.json"})
    for command in ("train", "check"):
        code, out, err = deltaw_command(command, file, *["--dry-run"][: command == "train"])
        assert (code, err) == (0, "")
        assert command == "check" or ("deepspeed: ZeRO stage 3" in out and "fsdp: true" in out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "deepspeed='ds.json': there is no such file, beside this one or in the working"),
        ("{", "deepspeed='ds.json': no JSON can be read there: Expecting property name"),
        ("[3]", "deepspeed='ds.json': must be DeepSpeed's settings, or the path of a JSON file"),
        ("\ud800", "deepspeed='ds.json': no JSON can be read there"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (problem,) = read(FACTORY | {"deepspeed": "ds.json"}, {}, Around(1, tmp_path)).problems
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: nothing is moved",
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload: nothing is moved"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights: it would change what is learnt",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True: give bf16: true instead"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True: the file has bf16: False"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: it would change what is learnt"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer: only AdamW with auto"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer: only AdamW with"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: the file has 1"),
        ({"gradient_clipping": 0.3}, "gradient_clipping=0.3: the file has 1.0; give auto"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu=2: the file has 8"),
        ({"curriculum_learning": {}}, "curriculum_learning: it would change what is learnt"),
        ({1: 2}, "deepspeed: 1: it would change"),
    ],
)
def test_what_would_change_what_is_learnt_is_refused(more: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(FACTORY | {"deepspeed": {**settings(3), **more}})


def test_numbers_that_say_the_same_are_accepted() -> None:
    same = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
    }
    file = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True}
    reading = read(FACTORY | file | {"deepspeed": settings(2, **same)}, {}, Around(4))
    assert not reading.problems and reading.values["fsdp"] is False
