"""Every key of every tool: known, checked, and never the cause of a crash."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.language.foreign.foreign_files import AXOLOTL, FACTORY, MLX, TRL, recipe_of
from tests.language.foreign.foreign_page import page
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from deltaw.errors import ConfigError, RunError
from deltaw.language.foreign import axolotl, llamafactory, mlx, trl
from deltaw.language.foreign.reading import read
from deltaw.language.foreign.tool import Effect, Ignored, Joint, Refused, Tool
from deltaw.train.recipe import Recipe

FILES = (
    (llamafactory.TOOL, FACTORY),
    (axolotl.TOOL, AXOLOTL),
    (mlx.TOOL, MLX),
    (trl.TOOL, TRL),
)
PAIRS = pytest.mark.parametrize(("tool", "file"), FILES, ids=lambda x: getattr(x, "name", ""))
STRANGE = (
    [],
    {},
    "x",
    "",
    -1,
    1.5,
    10**400,
    True,
    [1],
    [["a"]],
    {"a": 1},
    [{"a": None}],
    "\x1b[0m",
)
OLDER = {
    "evaluation_strategy",
    "warmup_ratio",
    "group_by_length",
    "overwrite_output_dir",
    "logging_dir",
}
"""Arguments that older releases of transformers had."""


@pytest.mark.parametrize(
    ("tool", "classes"),
    [
        (llamafactory.TOOL, [Seq2SeqTrainingArguments]),
        (trl.TOOL, [SFTConfig, ScriptArguments, ModelConfig, TrainingArguments]),
    ],
    ids=["llamafactory", "trl"],
)
def test_every_argument_of_the_real_trainers_is_known(tool: Tool, classes: list[Any]) -> None:
    fields = {field.name: field.default for kind in classes for field in dataclasses.fields(kind)}
    assert fields.keys() - tool.keys.keys() == set()
    refused = {
        name
        for name, default in fields.items()
        if isinstance(fate := tool.keys[name], Refused)
        and default not in (None, dataclasses.MISSING, *fate.harmless)
    }
    assert refused == {"do_train"}
    assert tool.keys.keys() >= OLDER


@pytest.mark.parametrize(("defaults", "kind"), [(llamafactory, Seq2SeqTrainingArguments)])
def test_the_defaults_are_those_of_the_trainer(defaults: Any, kind: Any) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(kind)}
    ours = defaults.TOOL.defaults
    assert ours["batch_size"] == theirs["per_device_train_batch_size"]
    assert ours["learning_rate"] == theirs["learning_rate"]
    assert ours["scheduler"] == theirs["lr_scheduler_type"]
    assert ours["warmup"] == theirs["warmup_steps"]
    assert ours["weight_decay"] == theirs["weight_decay"]
    assert ours["seed"] == theirs["seed"]
    recipe = recipe_of(FACTORY)
    assert recipe.epochs == theirs["num_train_epochs"]
    assert recipe.max_grad_norm == theirs["max_grad_norm"]


def test_trls_own_defaults_hold() -> None:
    theirs = {
        field.name: field.default
        for kind in (SFTConfig, ModelConfig)
        for field in dataclasses.fields(kind)
    }
    recipe = recipe_of(TRL)
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout) == (
        theirs["lora_r"],
        theirs["lora_alpha"],
        theirs["lora_dropout"],
    )
    assert (recipe.learning_rate, recipe.max_length) == (
        theirs["learning_rate"],
        theirs["max_length"],
    )
    assert recipe.gradient_checkpointing == theirs["gradient_checkpointing"]


@PAIRS
def test_effects_and_defaults_are_keys_of_a_recipe(tool: Tool, file: dict[str, Any]) -> None:
    effects = {fate.key for fate in tool.keys.values() if isinstance(fate, Effect)}
    assert (effects | tool.defaults.keys()) <= Recipe.model_fields.keys()


@PAIRS
def test_an_ignored_key_changes_nothing_and_is_said(tool: Tool, file: dict[str, Any]) -> None:
    plain = recipe_of(file)
    ignored = [key for key, fate in tool.keys.items() if isinstance(fate, Ignored)]
    assert ignored
    for key in ignored:
        reading = read(file | {key: 3}, {})
        assert recipe_of(file | {key: 3}) == plain
        assert reading.said is not None and key in reading.said


@PAIRS
def test_a_refused_key_is_refused_unless_harmless(tool: Tool, file: dict[str, Any]) -> None:
    plain = recipe_of(file)
    for key, fate in tool.keys.items():
        if not isinstance(fate, Refused):
            continue
        assert recipe_of(file | {key: None}) == plain
        for value in fate.harmless:
            assert recipe_of(file | {key: value}) == plain
        with pytest.raises(ConfigError, match=f"{key}='something': not done here; "):
            recipe_of(file | {key: "something"})


@PAIRS
def test_no_value_of_any_key_crashes(tool: Tool, file: dict[str, Any]) -> None:
    for key, fate in tool.keys.items():
        if not isinstance(fate, Effect | Joint):
            continue
        for value in STRANGE:
            try:
                recipe_of(file | {key: value})
            except (ConfigError, RunError) as error:
                assert "\x1b" not in str(error)


def test_the_page_says_what_the_code_does() -> None:
    written = (Path(__file__).parents[3] / "docs" / "llamafactory.md").read_text("utf-8")
    assert page() == written, "write it again: python -m tests.language.foreign.foreign_page"
