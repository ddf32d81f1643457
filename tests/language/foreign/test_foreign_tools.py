"""Files of axolotl, mlx-lm and TRL, and whose a file is."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.foreign.foreign_files import AXOLOTL, FACTORY, MLX, TRL, recipe_of, said_of

from deltaw.errors import ConfigError, RunError
from deltaw.language.foreign.reading import detect, read
from deltaw.train.recipe import parse


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (FACTORY, "LLaMA-Factory"),
        ({"stage": "sft"}, "LLaMA-Factory"),
        (AXOLOTL, "axolotl"),
        (MLX, "mlx-lm"),
        (TRL, "TRL"),
        ({"model_name_or_path": "m", "dataset_name": "d"}, "TRL"),
        ({"model_name_or_path": "m", "dataset": "d"}, "LLaMA-Factory"),
        ({"model_name_or_path": "m"}, "LLaMA-Factory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_is_known_by_its_keys(file: dict[str, Any], name: str) -> None:
    tool = detect(file)
    assert tool is not None and tool.name == name
    assert said_of(file).startswith(f"{name}'s, read as: ")


@pytest.mark.parametrize("file", [AXOLOTL, TRL], ids=["axolotl", "TRL"])
def test_noise_on_embeddings_is_asked_for_by_its_name(file: dict[str, Any]) -> None:
    assert recipe_of(file | {"neftune_noise_alpha": 5}).neftune_noise_alpha == 5
    assert recipe_of(file | {"neftune_noise_alpha": None}).neftune_noise_alpha == 0


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"model": "m", "data": "d", "r": 4, "max_samples": 3, "record": {}},
        {"model": "m", "data": "d", "neftune_noise_alpha": 5},
        {"model": "m", "data": "d", "lora_rank": 4},
        {"nonsense": 1},
    ],
)
def test_every_other_file_is_a_recipe_of_ours(file: dict[str, Any]) -> None:
    reading = read(file, {"seed": 1})
    assert reading.values == file | {"seed": 1}
    assert (reading.said, reading.problems, dict(reading.names)) == (None, (), {})


def test_axolotl() -> None:
    recipe = recipe_of(AXOLOTL)
    assert recipe.changed == {
        "model": "some/model",
        "data": "rows.jsonl",
        "output": "out",
        "task": "sft",
        "r": 32,
        "lora_alpha": 16.0,
        "learning_rate": 2e-4,
        "batch_size": 1,
        "epochs": 1.0,
        "scheduler": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "max_length": 512,
        "too_long": "drop",
        "group_by_length": False,
        "validation_share": 0.0,
        "seed": 42,
        "keep": "last",
    }
    assert (recipe.target_modules, recipe.train_on) == ("all-linear", "answers")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"adapter": "qlora", "load_in_4bit": True}, {"quantization_bit": 4}),
        ({"load_in_8bit": True}, {"quantization_bit": 8}),
        ({"lora_model_dir": ""}, {}),
        (
            {"lora_model_dir": "there", "lora_target_linear": None},
            {"adapter": ["there"], "r": 8, "lora_alpha": None},
        ),
        (
            {"lora_target_linear": None, "lora_target_modules": ["q_proj"]},
            {"target_modules": ["q_proj"]},
        ),
        ({"peft_use_dora": True, "peft_use_rslora": True}, {"use_dora": True, "use_rslora": True}),
        ({"sequence_len": 2048, "sample_packing": True}, {"max_length": 2048, "packing": True}),
        ({"micro_batch_size": 2, "num_epochs": 4}, {"batch_size": 2, "epochs": 4.0}),
        ({"lr_scheduler": "constant"}, {"scheduler": "constant_with_warmup", "warmup": 0.0}),
        ({"warmup_steps": 10, "optimizer": "adamw_torch_fused"}, {"warmup": 10.0}),
        ({"bf16": "auto", "tf32": False}, {"bf16": True}),
        ({"train_on_inputs": True}, {"train_on": "all"}),
        ({"chat_template": "chatml"}, {"template": "chatml"}),
        ({"chat_template": "tokenizer_default"}, {"template": None}),
        ({"val_set_size": 0.05}, {"validation_share": 0.05}),
        ({"datasets": [{"path": "a", "type": "alpaca"}]}, {"data": "a", "template": "alpaca"}),
        (
            {
                "datasets": [
                    {"path": "o/a", "name": "x", "type": "sharegpt", "split": "train"},
                    {"path": "b", "type": "chat_template", "ds_type": "json"},
                ]
            },
            {"data": "o/a:x,b"},
        ),
        ({"test_datasets": [{"path": "t", "type": "chat_template"}]}, {"eval_data": "t"}),
        ({"excess_length_strategy": "raise"}, {"too_long": "raise"}),
        ({"rl": "dpo"}, {"task": "dpo"}),
        ({"rl": "kto"}, {"task": "kto"}),
        ({"special_tokens": {"pad_token": "<x>"}}, {}),
        ({"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3, "local_rank": None}, {}),
        ({"attn_implementation": "sdpa", "lora_fan_in_fan_out": False}, {}),
    ],
    ids=lambda value: ",".join(value),
)
def test_a_key_of_axolotl_takes_effect(more: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe, plain = recipe_of(AXOLOTL | more).model_dump(), recipe_of(AXOLOTL).model_dump()
    assert {key: recipe[key] for key in expected} == expected
    assert {key for key in recipe if recipe[key] != plain[key]} <= expected.keys()


def test_axolotl_without_an_adapter_trains_everything() -> None:
    file = {key: value for key, value in AXOLOTL.items() if not key.startswith("lora_")}
    assert recipe_of(file | {"adapter": None}).method == "full"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adapter": "llama-adapter"}, "adapter='llama-adapter': choose lora or qlora"),
        ({"adapter": "qlora"}, "adapter=qlora needs load_in_4bit: true"),
        (
            {
                "adapter": None,
                "lora_model_dir": "there",
                "lora_r": None,
                "lora_alpha": None,
                "lora_target_linear": None,
            },
            "lora_model_dir needs adapter: lora",
        ),
        ({"lora_target_linear": None}, "lora_target_modules is missing"),
        ({"lora_target_modules": ["q"]}, "lora_target_linear and lora_target_modules: keep one"),
        ({"learning_rate": None}, "learning_rate is missing"),
        ({"datasets": None}, "datasets is missing"),
        ({"datasets": "a.jsonl"}, "datasets must be a list of"),
        ({"datasets": [{"path": 3, "type": "alpaca"}]}, "datasets 1: path is missing"),
        ({"datasets": [{"path": "a", "type": ["x"]}]}, "datasets 1: type must be one of alpaca"),
        (
            {"datasets": [{"path": "a", "type": "alpaca", "field_x": 1}]},
            "datasets 1: field_x is not read; name columns",
        ),
        (
            {"datasets": [{"path": "a", "type": "alpaca", "split": "test"}]},
            "datasets 1: the split train is read",
        ),
        (
            {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "completion"}]},
            "type alpaca has a template of its own",
        ),
        ({"special_tokens": {"eos_token": "<x>"}}, "special_tokens=.* not done here"),
        ({"optimizer": "adamw_bnb_8bit"}, "optimizer='adamw_bnb_8bit': .*; give adamw_torch"),
        ({"rl": "grpo"}, "rl='grpo': this training is not there yet; dpo and kto are"),
        ({"sequence_length": 5}, "unknown key sequence_length, .* did you mean sequence_len"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_axolotl_does_and_we_do_not(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipe_of(AXOLOTL | more)
    assert len(str(caught.value).splitlines()) == 3


def test_mlx() -> None:
    recipe = recipe_of(MLX)
    assert recipe.changed == {
        "model": "some/model",
        "data": "rows",
        "output": "adapters",
        "task": "sft",
        "r": 4,
        "lora_alpha": 40.0,
        "lora_dropout": 0.05,
        "max_steps": 600,
        "batch_size": 4,
        "learning_rate": 1e-5,
        "scheduler": "constant_with_warmup",
        "warmup": 0.0,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "validation_share": 0.0,
        "train_on": "all",
        "keep": "last",
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"fine_tune_type": "dora"}, {"use_dora": True}),
        ({"lora_parameters": None}, {"r": 8, "lora_alpha": 160.0, "lora_dropout": 0.0}),
        (
            {"lora_parameters": {"rank": 2, "keys": ["self_attn.q_proj"]}},
            {
                "r": 2,
                "lora_alpha": 40.0,
                "lora_dropout": 0.0,
                "target_modules": ["self_attn.q_proj"],
            },
        ),
        (
            {"lora_parameters": {"rank": 4, "alpha": 16.0, "scale": 10.0}},
            {"r": 4, "lora_alpha": 160.0},
        ),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, {"r": 4, "lora_alpha": 80.0}),
        ({"fine_tune_type": "full", "lora_parameters": None}, {"method": "full"}),
        ({"mask_prompt": True}, {"train_on": "last"}),
        ({"optimizer": "adamw"}, {"weight_decay": 0.01}),
        ({"max_seq_length": 64, "seed": 0, "batch_size": 2}, {"max_length": 64, "batch_size": 2}),
        ({"save_every": 10, "grad_checkpoint": True}, {"eval_every": 10}),
        ({"resume_adapter_file": "a"}, {"adapter": ["a"], "r": 8, "lora_alpha": None}),
    ],
    ids=lambda value: ",".join(value),
)
def test_a_key_of_mlx_takes_effect(more: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = recipe_of(MLX | more).model_dump()
    assert {key: recipe[key] for key in expected} == expected


def test_the_last_layers_of_mlx_are_counted_in_the_model(talker: Path) -> None:
    file = MLX | {"model": str(talker / "model")}
    assert recipe_of(file | {"num_layers": 1}).layers_to_transform == [1]
    assert recipe_of(file | {"num_layers": 2}).layers_to_transform is None
    assert recipe_of(file | {"num_layers": None}).layers_to_transform is None
    with pytest.raises(RunError, match=r"cannot be loaded[^$]*that AutoModelForCausalLM knows"):
        recipe_of(MLX | {"model": str(talker / "none"), "num_layers": 1})


@pytest.mark.parametrize("trust", [True, False, None])
def test_a_file_of_mlx_says_whether_a_models_code_is_run(
    trust: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def loaded(name: str, *, trust_remote_code: bool) -> None:
        asked.append(trust_remote_code)
        raise OSError("no such model")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", loaded)
    with pytest.raises(RunError, match="no such model"):
        recipe_of(MLX | {"num_layers": 1, "trust_remote_code": trust})
    assert asked == [bool(trust)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fine_tune_type": "oft"}, "fine_tune_type='oft': choose one of lora, dora, full"),
        ({"lora_parameters": [8]}, "lora_parameters must be a mapping"),
        ({"lora_parameters": {"beta": 8}}, "lora_parameters: unknown key beta; known are rank"),
        ({"lora_parameters": {"rank": "x"}}, "rank='x': must be a number"),
        ({"num_layers": 0}, "num_layers=0: must be a number of layers, or -1"),
        ({"num_layers": 1.5}, "num_layers=1.5: must be a number of layers, or -1"),
        ({"optimizer": "sgd"}, "optimizer='sgd': choose adam or adamw"),
        ({"lr_schedule": {"name": "cosine_decay"}}, "lr_schedule=.*give scheduler and warmup"),
        ({"resume_adapter_file": 3}, "resume_adapter_file=3: must be names"),
        ({"fine_tune_type": "full", "resume_adapter_file": "a"}, "file goes with fine_tune_type"),
        ({"resume_adapter_file": "a", "r": 4}, "r=4 has no effect with adapter"),
        ({"r": 4}, "r and lora_parameters say the same; keep one"),
        ({"fine_tune_type": "full", "num_layers": 4, "lora_parameters": None}, "num_layers goes"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_mlx_does_and_we_do_not(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(MLX | more)


def test_trl() -> None:
    recipe = recipe_of(TRL)
    assert recipe.changed == {
        "model": "some/model",
        "data": "some/rows",
        "output": "out",
        "task": "sft",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "learning_rate": 2e-5,
        "batch_size": 8,
        "epochs": 3.0,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "group_by_length": False,
        "bf16": True,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "separator": "",
        "validation_share": 0.0,
        "seed": 42,
        "keep": "last",
    }


def test_what_is_given_beside_a_file_of_trl_decides_its_rate() -> None:
    found = recipe_of(TRL, {"task": "dpo"})
    assert (found.task, found.learning_rate) == ("dpo", 1e-6)


def test_trl_evaluates_as_often_as_it_logs() -> None:
    assert recipe_of(TRL | {"eval_strategy": "steps"}).eval_every == 10
    assert recipe_of(FACTORY | {"eval_strategy": "steps"}).eval_every == 500


def test_mlx_counts_batches_and_not_steps() -> None:
    found = recipe_of(MLX | {"iters": 1000, "grad_accumulation_steps": 8, "save_every": 80})
    assert (found.max_steps, found.eval_every, found.gradient_accumulation) == (125, 10, 8)
    without = {key: value for key, value in MLX.items() if key not in ("iters", "save_every")}
    assert recipe_of(without | {"grad_accumulation_steps": 4}).max_steps == 250
    assert "columns: {prompt: prompt, response: completion}" in said_of(MLX)


def test_long_texts_of_axolotl_are_cut_into_pieces() -> None:
    texts = {"datasets": [{"path": "rows.jsonl", "type": "completion"}]}
    assert recipe_of(AXOLOTL | texts).too_long == "split"
    assert recipe_of(AXOLOTL).too_long == "drop"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"lora_r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 6.0}),
        ({"lora_target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}),
        ({"lora_modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}),
        ({"dataset_config": "part"}, {"data": "some/rows:part"}),
        ({"load_in_4bit": True}, {"quantization_bit": 4, "double_quantization": False}),
        (
            {"load_in_4bit": True, "use_bnb_nested_quant": True, "bnb_4bit_quant_type": "fp4"},
            {"quantization_bit": 4, "double_quantization": True, "quantization_type": "fp4"},
        ),
        ({"load_in_8bit": True}, {"quantization_bit": 8, "bf16": False}),
        ({"assistant_only_loss": True}, {"train_on": "answers"}),
        ({"completion_only_loss": False}, {"train_on": "all"}),
        ({"max_length": 64, "packing": True}, {"max_length": 64, "packing": True}),
        ({"use_peft": False}, {"method": "full", "r": 8}),
        (
            {"beta": 0.3, "loss_type": ["ipo"]},
            {"task": "dpo", "pref_beta": 0.3, "pref_loss": "ipo", "learning_rate": 1e-6},
        ),
        ({"label_smoothing": 0.1}, {"task": "dpo", "dpo_label_smoothing": 0.1}),
        ({"beta": 0.3}, {"task": None, "pref_beta": 0.3, "learning_rate": 1e-6}),
        ({"loss_type": "kto"}, {"task": "kto", "pref_loss": "sigmoid"}),
        (
            {"desirable_weight": 1.5, "undesirable_weight": 2, "learning_rate": 1e-5},
            {
                "task": "kto",
                "kto_chosen_weight": 1.5,
                "kto_rejected_weight": 2,
                "learning_rate": 1e-5,
            },
        ),
        ({"loss_type": "nll"}, {"task": "sft", "learning_rate": 2e-5}),
        ({"task": "dpo"}, {"task": "dpo", "learning_rate": 1e-6}),
        ({"task": "kto", "learning_rate": 1e-4}, {"task": "kto", "learning_rate": 1e-4}),
        ({"pref_loss": "simpo"}, {"task": "dpo", "pref_loss": "simpo", "learning_rate": 1e-6}),
        ({"pref_beta": 0.2}, {"task": None, "pref_beta": 0.2, "learning_rate": 1e-6}),
        ({"kto_chosen_weight": 2}, {"task": "kto", "learning_rate": 1e-6}),
        ({"task": "sft"}, {"task": "sft", "learning_rate": 2e-5}),
    ],
    ids=lambda value: ",".join(value),
)
def test_a_key_of_trl_takes_effect(more: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = recipe_of(TRL | more).model_dump()
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_target_modules": None}, "lora_target_modules is missing, and what PEFT takes"),
        ({"loss_type": "dft"}, "loss_type='dft': not done here"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type=.*: give one loss"),
        ({"loss_type": "aot"}, "loss_type='aot': Input should be 'sigmoid'"),
        ({"loss_type": []}, r"loss_type=\[\]: Input should be 'sigmoid'"),
        ({"desirable_weight": 2, "label_smoothing": 0.1}, "dpo_label_smoothing=0.1 has no effect"),
        ({"sync_ref_model": True}, "sync_ref_model=True: not done here; the reference stays"),
        ({"beta": "x"}, "beta='x': must be a number"),
        ({"beta": 0.1, "completion_only_loss": False, "loss_type": "ipo"}, "train_on='all' has no"),
        ({"packing_strategy": "wrapped"}, "packing_strategy='wrapped': not done here"),
        ({"dataset_name": None}, "dataset_name is missing"),
        (
            {"completion_only_loss": True, "assistant_only_loss": False},
            "completion_only_loss and assistant_only_loss contradict",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit contradict"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_trl_does_and_we_do_not(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(TRL | more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lora_rank": 4}, {"r": 4}),
        ({"r": 4}, {"r": 4}),
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3}),
        ({"batch_size": 2}, {"batch_size": 2}),
        ({"output": "elsewhere"}, {"output": "elsewhere"}),
        ({"max_steps": 5}, {"max_steps": 5, "epochs": None}),
        ({"epochs": 1}, {"epochs": 1.0}),
        ({"task": "sft", "method": "full", "lora_rank": None}, {"method": "full"}),
        ({"too_long": "drop"}, {"too_long": "drop"}),
    ],
    ids=lambda value: ",".join(value),
)
def test_the_command_line_comes_first_in_either_spelling(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    file = FACTORY | {"lora_rank": 16, "per_device_train_batch_size": 4, "max_steps": -1}
    recipe = recipe_of(file, given).model_dump()
    assert {key: recipe[key] for key in expected} == expected


def test_one_thing_twice_on_the_command_line_is_an_error() -> None:
    with pytest.raises(ConfigError, match="r and lora_rank say the same; keep one"):
        recipe_of(FACTORY, {"r": 4, "lora_rank": 8})


def test_a_foreign_key_on_the_command_line_comes_before_our_own_in_the_file() -> None:
    assert recipe_of(FACTORY | {"r": 4}, {"lora_rank": 16}).r == 16
    assert recipe_of(FACTORY | {"r": 4}).r == 4


def test_parse_uses_the_names_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"  - before\n  - rank='x': ") as caught:
        parse({"model": "m", "data": "d", "r": "x"}, names={"r": "rank"}, problems=["before"])
    assert "r='x'" not in str(caught.value)
