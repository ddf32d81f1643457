"""The YAML that `axolotl train` takes.

Source: github.com/axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas.
"""

from collections.abc import Mapping
from typing import Any

from deltaw.errors import printable
from deltaw.language.foreign import arguments, deepspeed
from deltaw.language.foreign.arguments import KEPT, PLACES, SHOWN, SPEED, STREAMING, UPLOAD
from deltaw.language.foreign.tool import (
    Effect,
    Fate,
    Found,
    Ignored,
    Joint,
    Refused,
    Tool,
    Values,
    each,
    misfit,
    names,
    number,
    optimizer,
    truth,
)

VOCABULARY = "change the tokenizer and the model's embeddings first, and save both"
ADAPTERS = ("lora", "qlora")
KINDS = ("alpaca", "chat_template", "sharegpt", "completion")
"""Types of data sets, which are found again from their columns."""
ENTRY = ("path", "type", "name", "split", "ds_type")
EIGHT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
TASKS = (None, "dpo", "kto")
BITS = Joint("`quantization_bit`")
TARGETS = Joint("`target_modules`")

WATCHED = Ignored("watchdog, which is on, knows by itself when a loss leaves its course")
FSDP = Joint("`fsdp: true`; what else it says is about memory only")


def _optimizer(value: Any) -> Any:
    if value in EIGHT:
        raise ValueError("moments in 8 bits are not done here; give adamw_torch, which is exact")
    return optimizer(value)


KEYS: dict[str, Fate] = {
    "base_model": Effect("model"),
    "revision_of_model": Effect("revision"),
    "trust_remote_code": Effect("trust_remote_code", truth),
    "adapter": Joint("`method`; `qlora` needs `load_in_4bit: true`"),
    "load_in_4bit": BITS,
    "load_in_8bit": BITS,
    "lora_r": Effect("r"),
    "lora_alpha": Effect("lora_alpha", number),
    "lora_dropout": Effect("lora_dropout", number),
    "lora_target_linear": TARGETS,
    "lora_target_modules": TARGETS,
    "lora_modules_to_save": Effect("modules_to_save", names),
    "peft_use_rslora": Effect("use_rslora", truth),
    "peft_use_dora": Effect("use_dora", truth),
    "loraplus_lr_ratio": Effect("loraplus_lr_ratio", number),
    "loraplus_lr_embedding": Effect("loraplus_lr_embedding", number),
    "lora_model_dir": Joint("`adapter`; what `lora_*` keys say of it is without effect"),
    "datasets": Joint("`data`, one entry after the other"),
    "test_datasets": Joint("`eval_data`"),
    "val_set_size": Effect("validation_share", number),
    "chat_template": Joint("`template`; `tokenizer_default` is the tokenizer's own"),
    "chat_template_jinja": Refused("save it as a .jinja file, and give that as template", ()),
    "train_on_inputs": Joint("`train_on: all`, else `answers`"),
    "sequence_len": Effect("max_length"),
    "excess_length_strategy": Effect("too_long"),
    "sample_packing": Effect("packing", truth),
    "micro_batch_size": Joint(arguments.EACH),
    "gradient_accumulation_steps": Effect("gradient_accumulation"),
    "num_epochs": Joint("`epochs`; `max_steps` goes before it"),
    "max_steps": Joint("`max_steps`"),
    "learning_rate": Effect("learning_rate", number),
    "lr_scheduler": Joint("`scheduler`"),
    "warmup_ratio": Joint("`warmup`, a share of the steps"),
    "warmup_steps": Joint("`warmup`, a number of steps"),
    "optimizer": Effect("optim", _optimizer),
    "weight_decay": Effect("weight_decay", number),
    "max_grad_norm": Effect("max_grad_norm", number),
    "neftune_noise_alpha": Effect("neftune_noise_alpha", number),
    "group_by_length": Effect("group_by_length", truth),
    "bf16": Joint("`bf16`; `auto` is true"),
    "bfloat16": Joint("`bf16`"),
    "fp16": Refused("give bf16: true, which needs no scaling of the loss"),
    "tf32": Refused(KEPT, (False, "auto")),
    "gradient_checkpointing": Effect("gradient_checkpointing", truth),
    "seed": Effect("seed"),
    "output_dir": Effect("output"),
    "resume_from_checkpoint": Refused("an interrupted run is always resumed; leave it out"),
    "deepspeed": deepspeed.FATE,
    "fsdp": FSDP,
    "fsdp_config": FSDP,
    "fsdp_version": SPEED,
    "special_tokens": Joint("nothing; `pad_token` alone is accepted, padding is never learnt"),
    "tokens": Refused(VOCABULARY, ([],)),
    "early_stopping_patience": Refused("give early_stopping, eval_every and keep: best", ()),
    "load_best_model_at_end": Refused("give keep: best and eval_every"),
    "rl": Joint("`task`, for `dpo` and `kto`"),
    "streaming": STREAMING,
    "hub_model_id": Refused(UPLOAD, ("",)),
    "push_dataset_to_hub": Refused(UPLOAD, ("",)),
    "plugins": Refused("they are code of others; leave it out", ([],)),
    "wandb_project": Refused("give report_to: wandb", ("",)),
    **each(("wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_run_id"), SHOWN),
    **each(("logging_steps", "evals_per_epoch", "eval_steps", "eval_table_size"), SHOWN),
    **each(("eval_strategy", "eval_batch_size", "eval_sample_packing", "strict", "debug"), SHOWN),
    **each(("saves_per_epoch", "save_steps", "save_strategy", "save_total_limit"), PLACES),
    **each(("save_safetensors", "save_only_model", "save_first_step"), PLACES),
    **each(("model_type", "tokenizer_type", "is_llama_derived_model"), SPEED),
    **each(("flash_attention", "sdp_attention", "xformers_attention", "eager_attention"), SPEED),
    **each(("attn_implementation", "local_rank", "lora_fan_in_fan_out"), SPEED),
    **each(("loss_watchdog_threshold", "loss_watchdog_patience"), WATCHED),
    **each(("pad_to_sequence_len", "gradient_checkpointing_kwargs", "torch_compile"), SPEED),
    **each(("dataset_prepared_path", "dataset_processes", "dataloader_num_workers"), SPEED),
    **each(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "low_cpu_mem_usage"), SPEED),
}
DEFAULTS: dict[str, Any] = {
    "batch_size": 1,
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


def join(given: Values, found: Found) -> None:
    """Read what several keys say together."""
    task = given.get("rl")
    if task in TASKS:
        found.choose(given, "task", task or "sft", "rl")
    else:
        found.problems.append(misfit("rl", task, "this training is not there yet; dpo and kto are"))
    special = given.get("special_tokens", {})
    if not isinstance(special, dict) or special.keys() - {"pad_token"}:
        found.problems.append(misfit("special_tokens", special, f"not done here; {VOCABULARY}"))
    adapter = given.get("adapter")
    if adapter is None:
        found.usual["method"] = "full"
        if given.get("lora_model_dir"):
            found.problems.append("lora_model_dir needs adapter: lora or qlora")
    elif adapter in ADAPTERS:
        found.give("method", "lora", "adapter")
        _adapter(given, found)
    else:
        found.problems.append(misfit("adapter", adapter, "choose lora or qlora, or leave it out"))
    bits = [bit for bit in (4, 8) if found.read(given, f"load_in_{bit}bit", truth)]
    for bit in bits:
        found.give("quantization_bit", bit, f"load_in_{bit}bit")
    if adapter == "qlora" and bits != [4]:
        found.problems.append("adapter=qlora needs load_in_4bit: true")
    renamed = {"num_epochs": "num_train_epochs", "lr_scheduler": "lr_scheduler_type"}
    shared = ("num_epochs", "max_steps", "lr_scheduler", "warmup_ratio", "warmup_steps")
    arguments.paced({renamed.get(k, k): given[k] for k in shared if k in given}, found, epochs=1.0)
    found.spread(given, "micro_batch_size")
    if "learning_rate" not in given:
        found.problems.append("learning_rate is missing")
    everything = found.read(given, "train_on_inputs", truth)
    found.choose(given, "train_on", "all" if everything else "answers", "train_on_inputs")
    for name in ("bf16", "bfloat16"):
        on = found.read(given, name, lambda value: value == "auto" or truth(value))
        if on is not None:
            found.give("bf16", on, name)
    if given.get("fsdp") or given.get("fsdp_config"):
        found.give("fsdp", True, "fsdp" if given.get("fsdp") else "fsdp_config")
    deepspeed.join(given, found)
    _data(given, found)


def _adapter(given: Values, found: Found) -> None:
    folders = found.read(given, "lora_model_dir", names) if given.get("lora_model_dir") else None
    if folders:
        found.go_on(folders, "lora_model_dir")
    else:
        _targets(given, found)


def _targets(given: Values, found: Found) -> None:
    every = found.read(given, "lora_target_linear", truth)
    modules = found.read(given, "lora_target_modules", names)
    if every and modules:
        found.problems.append("lora_target_linear and lora_target_modules: keep one")
    elif every:
        found.give("target_modules", "all-linear", "lora_target_linear")
    elif modules:
        found.give("target_modules", modules, "lora_target_modules")
    else:
        found.problems.append("lora_target_linear: true or lora_target_modules is missing")


def _data(given: Values, found: Found) -> None:
    kinds = []
    for name, key in (("datasets", "data"), ("test_datasets", "eval_data")):
        entries = given.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            found.problems.append(f"{name} must be a list of {{path: ..., type: ...}}")
            continue
        for place, entry in enumerate(entries, 1):
            found.problems += _entry_problems(f"{name} {place}", entry)
        kinds += [entry.get("type") for entry in entries]
        if entries:
            found.give(key, ",".join(map(_place, entries)), name)
    found.names.setdefault("data", "datasets")
    if kinds and all(kind == "completion" for kind in kinds):
        found.usual["too_long"] = "split"
    template = given.get("chat_template", "tokenizer_default")
    if "alpaca" in kinds:
        template = "alpaca"
        if any(kind != "alpaca" for kind in kinds):
            found.problems.append("datasets: type alpaca has a template of its own; train it alone")
    if template != "tokenizer_default":
        found.give("template", template, "chat_template")


def _entry_problems(where: str, entry: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{where}: {printable(str(key))} is not read; name columns with columns and tags"
        for key in entry
        if key not in ENTRY
    ]
    if not isinstance(entry.get("path"), str):
        problems.append(f"{where}: path is missing")
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"{where}: type must be one of {', '.join(KINDS)}")
    if entry.get("split", "train") != "train":
        problems.append(f"{where}: the split train is read; leave split out")
    return problems


def _place(entry: Mapping[str, Any]) -> str:
    part = f":{entry['name']}" if entry.get("name") else ""
    return f"{entry.get('path')}{part}"


TOOL = Tool("axolotl", frozenset({"base_model"}), KEYS, DEFAULTS, join)
