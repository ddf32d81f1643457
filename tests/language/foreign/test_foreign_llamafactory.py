"""LLaMA-Factory's files: what every key becomes."""

from typing import Any

import pytest
from tests.language.foreign.foreign_files import AXOLOTL, FACTORY, recipe_of, said_of

from deltaw.errors import ConfigError
from deltaw.language.foreign.reading import read
from deltaw.language.foreign.tool import Around


def test_the_minimum_has_the_defaults_of_its_own_tool() -> None:
    recipe = recipe_of(FACTORY)
    assert recipe.changed == {
        "model": "some/model",
        "data": "one,two",
        "dataset_dir": "data",
        "template": "chatml",
        "output": "out",
        "task": "sft",
        "epochs": 3.0,
        "batch_size": 8,
        "learning_rate": 5e-5,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "group_by_length": False,
        "gradient_checkpointing": True,
        "validation_share": 0.0,
        "seed": 42,
        "keep": "last",
    }
    assert (recipe.method, recipe.r, recipe.lora_alpha) == ("lora", 8, None)
    assert (recipe.scheduler, recipe.target_modules) == ("linear", "all-linear")
    assert (recipe.train_on, recipe.lora_dropout) == ("answers", 0.0)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model_revision": "v2"}, {"revision": "v2"}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"lora_rank": 24, "lora_alpha": 7}, {"r": 24, "lora_alpha": 7.0}),
        ({"lora_rank": "24"}, {"r": 24}),
        ({"lora_alpha": None}, {"lora_alpha": None}),
        ({"lora_dropout": 0.05}, {"lora_dropout": 0.05}),
        ({"lora_target": "all"}, {"target_modules": "all-linear"}),
        ({"lora_target": "q_proj, v_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"lora_target": ["k_proj"]}, {"target_modules": ["k_proj"]}),
        (
            {"additional_target": "embed_tokens,lm_head"},
            {"modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"metric_for_best_model": "rouge-l"}, {"metric": "rouge_l"}),
        ({"metric_for_best_model": "eval_bleu-4"}, {"metric": "bleu"}),
        ({"metric_for_best_model": "chrf"}, {"metric": "chrf"}),
        ({"max_new_tokens": 64, "num_beams": 4}, {"max_new_tokens": 64, "num_beams": 4}),
        ({"generation_num_beams": 3}, {"num_beams": 3}),
        (
            {"length_penalty": 0.9, "repetition_penalty": 1.1},
            {"length_penalty": 0.9, "repetition_penalty": 1.1},
        ),
        ({"use_dora": "true"}, {"use_dora": True}),
        ({"pissa_init": True}, {"init_lora_weights": "pissa_niter_16"}),
        ({"pissa_init": True, "pissa_iter": 4}, {"init_lora_weights": "pissa_niter_4"}),
        ({"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa_exact"}),
        ({"pissa_init": False, "pissa_iter": 4}, {"init_lora_weights": True}),
        (
            {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-5},
            {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5},
        ),
        ({"adapter_name_or_path": "a"}, {"adapter": ["a"]}),
        ({"adapter_name_or_path": "a, b", "lora_rank": 64}, {"adapter": ["a", "b"], "r": 8}),
        ({"adapter_name_or_path": ["a"], "adapter_folder": "x"}, {"adapter": ["a/x"]}),
        (
            {"adapter_name_or_path": "a,b", "create_new_adapter": True, "lora_rank": 64},
            {"adapter": ["a", "b"], "create_new_adapter": True, "r": 64},
        ),
        (
            {"adapter_name_or_path": "a", "finetuning_type": "full", "create_new_adapter": True},
            {"adapter": ["a"], "method": "full"},
        ),
        ({"create_new_adapter": True, "adapter_folder": "x"}, {}),
        ({"finetuning_type": "full"}, {"method": "full"}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 3},
            {"method": "freeze", "last_layers": 3},
        ),
        ({"finetuning_type": "freeze"}, {"method": "freeze", "last_layers": 2}),
        ({"dataset": ["a", "b"]}, {"data": "a,b"}),
        ({"eval_dataset": "c, d"}, {"eval_data": "c,d"}),
        ({"dataset_dir": "there"}, {"dataset_dir": "there"}),
        ({"dataset_dir": "ONLINE"}, {"dataset_dir": None}),
        ({"default_system": "Be brief."}, {"default_system": "Be brief."}),
        ({"cutoff_len": 512}, {"max_length": 512}),
        ({"max_samples": 100}, {"max_samples": 100}),
        (
            {"mix_strategy": "interleave_over", "interleave_probs": "0.25,0.75"},
            {"mix_strategy": "interleave_over", "interleave_probs": [0.25, 0.75]},
        ),
        ({"train_on_prompt": True}, {"train_on": "all"}),
        ({"mask_history": True}, {"train_on": "last"}),
        ({"packing": True}, {"packing": True}),
        ({"neat_packing": True}, {"packing": True}),
        ({"packing": True, "neat_packing": True}, {"packing": True}),
        ({"packing": False, "neat_packing": False}, {"packing": False}),
        ({"val_size": 0.1}, {"validation_share": 0.1}),
        ({"val_size": 50}, {"validation_share": 50.0}),
        ({"per_device_train_batch_size": 2}, {"batch_size": 2}),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation": 4}),
        ({"learning_rate": "1e-4"}, {"learning_rate": 1e-4}),
        ({"num_train_epochs": 2.5}, {"epochs": 2.5, "max_steps": None}),
        ({"max_steps": 7}, {"epochs": None, "max_steps": 7}),
        ({"max_steps": 7, "num_train_epochs": 2}, {"epochs": None, "max_steps": 7}),
        ({"max_steps": -1}, {"epochs": 3.0, "max_steps": None}),
        ({"lr_scheduler_type": "cosine"}, {"scheduler": "cosine"}),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
            {"scheduler": "polynomial", "scheduler_kwargs": {"power": 2}},
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'},
            {"scheduler": "cosine_with_min_lr", "scheduler_kwargs": {"min_lr": 1e-6}},
        ),
        ({"warmup_ratio": 0.1}, {"warmup": 0.1}),
        ({"warmup_steps": 20}, {"warmup": 20.0}),
        ({"warmup_steps": 0.1}, {"warmup": 0.1}),
        ({"warmup_steps": 20, "warmup_ratio": 0}, {"warmup": 20.0}),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            {"scheduler": "constant_with_warmup", "warmup": 0.0},
        ),
        ({"weight_decay": 0.1, "max_grad_norm": 0.5}, {"weight_decay": 0.1, "max_grad_norm": 0.5}),
        ({"neftune_noise_alpha": 5}, {"neftune_noise_alpha": 5.0}),
        ({"optim": "adamw_torch"}, {"optim": "adamw"}),
        ({"bf16": True}, {"bf16": True}),
        ({"pure_bf16": True, "fp16": False}, {"bf16": True}),
        ({"seed": 3}, {"seed": 3}),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"min_num_params": 0}}, {"fsdp": True}),
        ({"fsdp": ""}, {"fsdp": False}),
        ({"quantization_bit": 8}, {"quantization_bit": 8}),
        (
            {
                "quantization_bit": 4,
                "quantization_type": "fp4",
                "quantization_method": "bitsandbytes",
                "double_quantization": False,
            },
            {
                "quantization_bit": 4,
                "quantization_type": "fp4",
                "quantization_method": "bnb",
                "double_quantization": False,
            },
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 100},
            {"eval_every": 50, "keep": "last"},
        ),
        ({"evaluation_strategy": "steps", "logging_steps": 5}, {"eval_every": 5}),
        ({"eval_strategy": "steps"}, {"eval_every": 500}),
        (
            {"eval_strategy": "epoch", "load_best_model_at_end": True, "save_steps": 5},
            {"eval_each_epoch": True, "eval_every": None, "keep": "best"},
        ),
        ({"plot_loss": True}, {"plot_loss": True}),
        (
            {"eval_dataset": "b,c", "eval_on_each_dataset": True},
            {"eval_data": "b,c", "eval_on_each_dataset": True},
        ),
        ({"upcast_layernorm": True}, {"bf16": False}),
        ({"tokenized_path": "cache"}, {}),
        ({"streaming": True, "buffer_size": 64}, {}),
        ({"disable_shuffling": True}, {"shuffle": False}),
        ({"disable_shuffling": "false"}, {"shuffle": True}),
        ({"train_sampling_strategy": "sequential"}, {"shuffle": False}),
        ({"tool_format": "qwen", "template": "qwen2"}, {"template": "qwen2"}),
        (
            {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": "1e-6"},
            {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
        ),
        ({"eval_strategy": "no", "save_steps": 100}, {"eval_every": 100}),
        ({"eval_strategy": False}, {"eval_every": None}),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5},
            {"keep": "best", "eval_every": 5},
        ),
        (
            {"early_stopping_steps": 3, "eval_strategy": "steps", "eval_steps": 5},
            {"early_stopping": 3, "eval_every": 5},
        ),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": "wandb,tensorboard"}, {"report_to": ["wandb", "tensorboard"]}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"group_by_length": True}, {"group_by_length": True}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        ({"resume_from_checkpoint": None}, {}),
        ({"resume_from_checkpoint": True}, {}),
        (
            {"finetuning_type": "full", "use_galore": True, "galore_layerwise": True},
            {"method": "full", "optim": "galore_adamw_layerwise", "galore_rank": 16},
        ),
        (
            {
                "finetuning_type": "full",
                "use_galore": True,
                "optim": "adamw_torch",
                "galore_rank": 32,
                "galore_update_interval": 100,
                "galore_scale": 0.5,
                "galore_target": "mlp,attn",
            },
            {
                "method": "full",
                "optim": "galore_adamw",
                "galore_rank": 32,
                "galore_update_interval": 100,
                "galore_scale": 0.5,
                "galore_target": ["mlp", "attn"],
            },
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_key_takes_effect(more: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe, plain = recipe_of(FACTORY | more).model_dump(), recipe_of(FACTORY).model_dump()
    assert {key: recipe[key] for key in expected} == expected
    touched = {key for key in recipe if recipe[key] != plain[key]}
    assert touched <= expected.keys() | {"warmup"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cutof_len": 1}, "unknown key cutof_len, .* did you mean cutoff_len?"),
        ({"a\x1b[2Jb": 1}, r"unknown key a\\x1b\[2Jb"),
        ({"lora_rank": "many"}, "lora_rank='many': Input should be a valid integer"),
        ({"lora_rank": True}, "lora_rank=True: must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be a number"),
        ({"learning_rate": "inf"}, "learning_rate='inf': must be a finite number"),
        ({"use_dora": "maybe"}, "use_dora='maybe': must be true or false"),
        ({"use_dora": 1}, "use_dora=1: must be true or false"),
        ({"lora_target": 5}, "lora_target=5: must be names with commas"),
        ({"lora_target": " , "}, "lora_target=' , ': names nothing"),
        ({"interleave_probs": {}}, "interleave_probs={}: must be numbers with commas"),
        ({"interleave_probs": "a,b"}, "interleave_probs='a,b': must be a number"),
        ({"finetuning_type": "oft"}, "finetuning_type='oft': choose lora, full or freeze"),
        ({"fp16": True}, "fp16=True: not done here; give bf16: true"),
        ({"quantization_bit": 3}, "quantization_bit=3: Input should be 4 or 8"),
        ({"quantization_method": "hqq"}, "quantization_method='hqq': Input should be 'bnb'"),
        ({"lr_scheduler_type": "sine"}, "lr_scheduler_type='sine': Input should be"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type='greedy': it goes by a score"),
        ({"lr_scheduler_kwargs": "{"}, "lr_scheduler_kwargs='{': must be names with values"),
        ({"lr_scheduler_kwargs": [1]}, r"lr_scheduler_kwargs=\[1\]: must be names with values"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "linear reads none, and not power"),
        ({"adapter_name_or_path": 3}, "adapter_name_or_path=3: must be names with commas"),
        (
            {"adapter_name_or_path": "a,b", "quantization_bit": 4},
            "quantization_bit does not go with adapters that are merged first",
        ),
        ({"adapter_name_or_path": "a", "r": 4}, "r=4 has no effect with adapter, whose own"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5: must be a share from 0 to below 1"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio and warmup_steps contradict"),
        ({"warmup_steps": 5.5}, "warmup_steps=5.5: must be a share below 1, or a whole number"),
        ({"val_size": 1.5}, "val_size=1.5: must be a share below 1, or a whole number"),
        ({"packing": False, "neat_packing": True}, "packing=False and neat_packing=True contra"),
        ({"train_on_prompt": True, "mask_history": True}, "train_on_prompt and mask_history cont"),
        ({"deepspeed": "ds.json"}, "deepspeed='ds.json': there is no such file"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha=-1: Input should be greater than or"),
        ({"adam_beta2": 1}, "adam_beta2=1: Input should be less than 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: not done here"),
        ({"tool_format": "glm4", "template": "qwen"}, "tool_format='glm4': only qwen is written"),
        ({"tool_format": "qwen", "template": "llama3"}, "tool_format='qwen': only qwen is written"),
        ({"packing": True, "disable_shuffling": True}, "shuffle=False does not go with packing"),
        (
            {"group_by_length": True, "disable_shuffling": True},
            "group_by_length and an order that is not drawn contradict each other",
        ),
        (
            {"group_by_length": True, "train_sampling_strategy": "sequential"},
            "group_by_length and an order that is not drawn contradict each other",
        ),
        ({"stage": "kto", "disable_shuffling": True}, "shuffle=False does not go with task=kto"),
        ({"upcast_layernorm": True, "bf16": True}, "upcast_layernorm: true with bf16"),
        ({"upcast_layernorm": True, "pure_bf16": True}, "upcast_layernorm: true with bf16"),
        ({"use_badam": True}, "use_badam=True: not done here"),
        ({"push_to_hub": True}, "push_to_hub=True: not done here; nothing is uploaded"),
        ({"do_train": False}, "do_train=False: not done here; deltaw train trains"),
        ({"do_predict": True}, "do_predict=True: not done here; deltaw eval"),
        ({"pref_beta": 0.2}, "pref_beta=0.2 has no effect with .*sft"),
        ({"stage": "dpo", "packing": True}, "packing=True has no effect with .*dpo"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss='kto_pair': .*stage: kto"),
        ({"stage": "dpo", "pref_loss": "orpa"}, "pref_loss='orpa': Input should be 'sigmoid'"),
        ({"stage": "dpo", "pref_loss": "exo_pair"}, "exo_pair needs dpo_label_smoothing above 0"),
        ({"stage": "dpo", "simpo_gamma": 1}, "simpo_gamma=1 has no effect with pref_loss=sigmoid"),
        (
            {"stage": "dpo", "pref_loss": "ipo", "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing=0.1 has no effect with pref_loss=ipo",
        ),
        ({"stage": "kto", "pref_loss": "ipo"}, "pref_loss='ipo' has no effect with task=kto"),
        ({"stage": "dpo", "kto_chosen_weight": 2}, "kto_chosen_weight=2.0 has no effect with"),
        ({"stage": "kto", "kto_rejected_weight": 0}, "kto_rejected_weight=0: .*greater than 0"),
        ({"stage": "dpo", "pref_ftx": 0.5}, "pref_ftx=0.5: not done here"),
        ({"optim": "adafactor"}, "optim='adafactor': Input should be"),
        ({"use_galore": True}, "use_galore needs finetuning_type: full or freeze"),
        ({"galore_layerwise": True}, "galore_layerwise has no effect without use_galore"),
        (
            {"finetuning_type": "full", "use_galore": True, "optim": "galore_adamw_8bit"},
            "optim and use_galore contradict",
        ),
        ({"dataset_dir": "REMOTE:a/b"}, "dataset_dir='REMOTE:a/b': download it"),
        ({"eval_strategy": "often"}, "eval_strategy='often': must be one of no, steps, epoch"),
        (
            {"load_best_model_at_end": True},
            "load_best_model_at_end needs eval_strategy: steps, or epoch",
        ),
        ({"early_stopping_steps": 2}, "early_stopping_steps needs eval_strategy: steps"),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, "eval_steps=0.1: Input should be a valid"),
        ({"metric_for_best_model": "rouge"}, "metric_for_best_model='rouge': give loss, exact_"),
        ({"num_beams": 0}, "num_beams=0: Input should be greater"),
        ({"num_beams": 2, "generation_num_beams": 4}, "num_beams and generation_num_beams contra"),
        ({"train_sampling_strategy": "odd"}, "train_sampling_strategy=.odd.: give random"),
        (
            {"freeze_trainable_layers": -2, "finetuning_type": "freeze"},
            "freeze_trainable_layers=-2",
        ),
        (
            {"gradient_checkpointing": True, "disable_gradient_checkpointing": True},
            "gradient_checkpointing and disable_gradient_checkpointing contradict",
        ),
        (
            {"resume_from_checkpoint": "old/checkpoint-1"},
            "resume_from_checkpoint='old/check.*newest",
        ),
        ({"resume_from_checkpoint": False}, "resume_from_checkpoint=False: .*--overwrite"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"data": "mine.jsonl"}, "data and dataset say the same; keep one"),
        ({"task": "regression"}, "task and stage say the same; keep one"),
    ],
    ids=lambda value: ",".join(map(repr, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_done_is_said_under_its_own_name(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipe_of(FACTORY | more)
    assert len(str(caught.value).splitlines()) == 3


def test_all_that_is_wrong_comes_together() -> None:
    wrong = {"fp16": True, "lora_rnk": 4, "lora_rank": "x", "optim_args": "a=1", "seed": -1}
    with pytest.raises(ConfigError) as caught:
        recipe_of(FACTORY | wrong)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "Fix: correct the file, or give key=value behind it."
    assert lines[0] == "The recipe from file.yaml cannot be used:"
    assert sorted(line.split()[1].split("=")[0] for line in lines[1:-1]) == [
        "fp16",
        "lora_rank",
        "optim_args",
        "seed",
        "unknown",
    ]


def test_preferences_and_plain_texts_have_stages_of_their_own() -> None:
    more = {"stage": "dpo", "pref_beta": 0.3, "pref_loss": "ipo", "pref_ftx": 0.0}
    found = recipe_of(FACTORY | more)
    assert (found.task, found.pref_beta, found.pref_loss) == ("dpo", 0.3, "ipo")
    alone = {"stage": "dpo", "pref_loss": "simpo", "simpo_gamma": 1.2}
    found = recipe_of(FACTORY | alone)
    assert (found.pref_loss, found.simpo_gamma) == ("simpo", 1.2)
    smooth = {"stage": "dpo", "dpo_label_smoothing": 0.2, "pref_loss": "robust"}
    found = recipe_of(FACTORY | smooth)
    assert (found.pref_loss, found.dpo_label_smoothing) == ("robust", 0.2)
    weights = {"kto_chosen_weight": 2, "kto_rejected_weight": "1.5"}
    found = recipe_of(FACTORY | weights | {"stage": "kto", "pref_beta": 0.3})
    assert (found.task, found.pref_beta) == ("kto", 0.3)
    assert (found.kto_chosen_weight, found.kto_rejected_weight) == (2, 1.5)
    plain = recipe_of(FACTORY | {"stage": "pt"})
    assert (plain.task, plain.packing) == ("sft", True)
    assert recipe_of(FACTORY | {"stage": "pt", "packing": False}).packing is False


@pytest.mark.parametrize("stage", ["rm", "ppo", "sftt", 5])
def test_of_another_stage_only_unknown_keys_are_said_too(stage: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(FACTORY | {"stage": stage, "pref_beta": 0.1, "fp16": True, "nonsense": 1})
    first, second, *rest = str(caught.value).splitlines()[1:]
    assert f"stage={stage}" in first or f"stage={stage!r}" in first
    assert second.startswith("  - unknown key nonsense, neither LLaMA-Factory's nor deltaw's")
    assert len(rest) == 1


def test_the_newest_checkpoint_of_the_run_may_be_named(tmp_path: Any) -> None:
    for step in (4, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    file = FACTORY | {"output_dir": str(tmp_path)}
    recipe_of(file | {"resume_from_checkpoint": str(tmp_path / "checkpoint-12")})
    with pytest.raises(ConfigError, match="newest checkpoint"):
        recipe_of(file | {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")})


def test_what_is_said_of_a_file() -> None:
    file = FACTORY | {
        "overwrite_output_dir": True,
        "plot_loss": True,
        "ddp_timeout": 180000000,
        "packing": True,
        "trust_remote_code": True,
        "max_samples": 5,
        "hf_hub_token": "secret",
        "predict_with_generate": True,
        "temperature": 0.95,
    }
    said = said_of(file)
    first, defaults, ignored, *notes = said.splitlines()
    assert first.startswith("LLaMA-Factory's, read as: model=some/model, ")
    assert "packing=True" in first and "epochs=3.0" in defaults
    assert ignored.endswith(": ddp_timeout, temperature, hf_hub_token")
    assert {note.split()[0] for note in notes} == {
        "packed",
        "max_samples",
        "overwrite_output_dir",
        "trust_remote_code:",
        "predict_with_generate:",
    }
    other = said_of(FACTORY | {"stage": "dpo", "num_beams": 4})
    assert other.splitlines()[2].endswith(": num_beams")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"eval_strategy": "epoch", "save_steps": 9},
            "ignored, for they do not change what is learnt: save_steps",
        ),
        ({"eval_steps": 50}, "ignored, for they do not change what is learnt: eval_steps"),
        (
            {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 100},
            "ignored, for they do not change what is learnt: save_steps",
        ),
        ({"logging_steps": 10}, "ignored, for they do not change what is learnt: logging_steps"),
        ({"create_new_adapter": True}, "what is learnt: create_new_adapter"),
        ({"adapter_folder": "x"}, "what is learnt: adapter_folder"),
    ],
)
def test_a_key_without_effect_is_said(more: dict[str, Any], said: str) -> None:
    assert said in said_of(FACTORY | more)
    used = {"eval_strategy": "steps", "eval_steps": 50, "save_strategy": "no"}
    assert "eval_steps" not in said_of(FACTORY | used)


@pytest.mark.parametrize(
    ("file", "name", "usual"),
    [(FACTORY, "per_device_train_batch_size", 8), (AXOLOTL, "micro_batch_size", 1)],
)
def test_rows_of_each_process_become_those_of_all(
    file: dict[str, Any], name: str, usual: int
) -> None:
    assert read(file, {}, Around(4)).values["batch_size"] == 4 * usual
    for rows in (3, "3"):
        reading = read(file | {name: rows}, {}, Around(4))
        assert reading.values["batch_size"] == 12
        said = reading.said or ""
        assert f"{name} is for each of the 4 processes, batch_size=12 for all" in said
    alone = read(file | {name: 3}, {})
    assert alone.values["batch_size"] == 3 and "for each of" not in (alone.said or "")
    ours = read(file | {name: 3}, {"batch_size": 6}, Around(4))
    assert ours.values["batch_size"] == 6 and "for each of" not in (ours.said or "")


def test_an_unknown_key_is_an_error_with_null_too() -> None:
    with pytest.raises(ConfigError, match="unknown key foo, neither"):
        recipe_of(FACTORY | {"foo": None})


def test_a_value_without_effect_is_said_with_the_names_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(FACTORY | {"finetuning_type": "full", "lora_rank": 16})
    assert (
        "r=16 has no effect with method=full, only with lora; leave it out, or did you mean "
        "method=lora? (in the file, r is lora_rank and method is finetuning_type)\n"
    ) in str(caught.value)


def test_the_settings_of_an_adapter_that_is_trained_on_are_its_own() -> None:
    more = {"adapter_name_or_path": "a", "lora_rank": 64, "lora_target": "q_proj"}
    said = said_of(FACTORY | more)
    assert "lora_rank, lora_target: without effect, the adapter's own settings hold" in said
    assert "without effect" not in said_of(FACTORY | more | {"create_new_adapter": True})
