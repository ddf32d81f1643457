"""Keys and values of a recipe by the names that other trainers have for them."""

from collections.abc import Mapping
from typing import Any

from deltaw.errors import printable

SYNONYMS = {
    "alpha": "lora_alpha",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "model_name_or_path": "model",
    "dataset": "data",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "scheduler",
    "lr_scheduler_kwargs": "scheduler_kwargs",
    "warmup_ratio": "warmup",
    "cutoff_len": "max_length",
    "val_size": "validation_share",
    "max_seq_length": "max_length",
    "finetuning_type": "method",
    "load_in_4bit": "quantization_bit",
    "load_in_8bit": "quantization_bit",
    "bnb_4bit_quant_type": "quantization_type",
    "bnb_4bit_use_double_quant": "double_quantization",
    "save_steps": "eval_every",
    "eval_steps": "eval_every",
    "loraplus_weight_decay": "weight_decay",
    "update_proj_gap": "galore_update_interval",
    "proj_type": "galore_proj_type",
    "exact_svd": "galore_exact_svd",
    "optim_target_modules": "galore_target",
    "adapters": "adapter",
    "adapter_name_or_path": "adapter",
    "lora_model_dir": "adapter",
    "resume_adapter_file": "adapter",
    "pissa_init": "init_lora_weights: pissa",
}
"""What an unknown key probably means."""

METHODS = {
    "dora": "use_dora: true",
    "rslora": "use_rslora: true",
    "pissa": "init_lora_weights: pissa",
    "qlora": "quantization_bit: 4",
    "loraplus": "loraplus_lr_ratio: 16",
}
"""What makes `method: lora` what others call a method of its own."""

OPTIMIZERS = {"galore": "galore_adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw"}
"""Other names of a recipe's `optim`."""

SWITCHES = ("use_galore", "galore_layerwise")


def respelt(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values with LLaMA-Factory's switches for GaLore as `optim`, and what is wrong."""
    plain = {key: value for key, value in values.items() if key not in SWITCHES}
    given = {key: values[key] for key in SWITCHES if key in values}
    problems = [
        f"{key}={printable(repr(value))}: must be true or false"
        for key, value in given.items()
        if not isinstance(value, bool)
    ]
    if any(given.values()) and "optim" in values:
        problems.append(f"optim does not go with {' and '.join(given)}; keep optim alone")
    if given.get("galore_layerwise") and not given.get("use_galore"):
        problems.append("galore_layerwise has no effect without use_galore: true")
    if given.get("use_galore") and not problems:
        layerwise = "_layerwise" if given.get("galore_layerwise") else ""
        plain["optim"] = f"galore_adamw{layerwise}"
    return plain, problems
