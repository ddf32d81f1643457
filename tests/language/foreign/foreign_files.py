"""Files of other trainers, and the recipes that they are read as."""

from typing import Any

from deltaw.language.foreign.reading import read
from deltaw.train.recipe import Recipe, parse

FACTORY: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "one,two",
    "template": "chatml",
    "output_dir": "out",
}
AXOLOTL: dict[str, Any] = {
    "base_model": "some/model",
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "learning_rate": 2e-4,
    "output_dir": "out",
}
MLX: dict[str, Any] = {
    "model": "some/model",
    "data": "rows",
    "train": True,
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.05},
    "iters": 600,
    "adapter_path": "adapters",
}
TRL: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/rows",
    "use_peft": True,
    "lora_target_modules": "all-linear",
    "output_dir": "out",
}


def recipe_of(file: dict[str, Any], given: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a file, as the command line makes it."""
    reading = read(file, given or {})
    return parse(reading.values, "file.yaml", names=reading.names, problems=reading.problems)


def said_of(file: dict[str, Any], given: dict[str, Any] | None = None) -> str:
    """What is said of a file."""
    return read(file, given or {}).said or ""
