"""The YAML that `mlx_lm.lora --config` takes.

Source: github.com/ml-explore/mlx-lm, mlx_lm/lora.py.
"""

from typing import Any

import transformers

from deltaw.errors import printable
from deltaw.language.foreign.arguments import SHOWN, UPLOAD
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
    layers,
    misfit,
    names,
    number,
    reports,
    truth,
)
from deltaw.train.model import LOADING, cannot_load, quiet

SETTINGS = ("rank", "alpha", "scale", "dropout", "keys")
KINDS = ("lora", "dora", "full")
KEYS: dict[str, Fate] = {
    "model": Effect("model"),
    "data": Effect("data"),
    "adapter_path": Effect("output"),
    "train": Refused("deltaw train trains; leave it out", (True,)),
    "fine_tune_type": Joint("`method`; `dora` is `use_dora: true`"),
    "lora_parameters": Joint("`r`, `lora_alpha` (scale times rank), `lora_dropout`, targets"),
    "num_layers": Joint("`layers_to_transform`, the last ones"),
    "iters": Joint("`max_steps`, times `gradient_accumulation`, as they count batches"),
    "batch_size": Effect("batch_size"),
    "grad_accumulation_steps": Effect("gradient_accumulation"),
    "learning_rate": Effect("learning_rate", number),
    "optimizer": Joint("`optim: adamw`; `adam` has no weight decay"),
    "optimizer_config": Refused("give weight_decay", ({},)),
    "lr_schedule": Refused("give scheduler and warmup", ({},)),
    "max_seq_length": Effect("max_length"),
    "mask_prompt": Joint("`train_on: last`, else `all`"),
    "grad_checkpoint": Effect("gradient_checkpointing", truth),
    "seed": Effect("seed"),
    "report_to": Effect("report_to", reports),
    "wandb": Refused("give report_to: wandb"),
    "save_every": Joint("`eval_every`, times `gradient_accumulation`, as `iters`"),
    "resume_adapter_file": Joint("`adapter`; `lora_parameters` and `num_layers` are its own"),
    "test": Refused("deltaw eval scores a run; leave it out"),
    "hf_dataset": Refused("give the data set's name as data", ()),
    "trust_remote_code": Effect("trust_remote_code", truth),
    "upload_repo": Refused(UPLOAD, ()),
    **each(
        ("steps_per_report", "steps_per_eval", "val_batches", "test_batches", "project_name"),
        SHOWN,
    ),
    "clear_cache_threshold": Ignored("memory only"),
}
DEFAULTS: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-5,
    "scheduler": "constant_with_warmup",
    "warmup": 0.0,
    "max_grad_norm": 0.0,
    "group_by_length": True,
    "validation_share": 0.0,
    "keep": "last",
}
RANK, SCALE, LAYERS, ITERS = 8, 20.0, 16, 1000
OLD_SCALE = 10.0
"""The scale of files with an `alpha`, which mlx-lm multiplied by alpha / rank."""


def join(given: Values, found: Found) -> None:
    """Read what several keys say together."""
    found.usual["task"] = "sft"
    kind = given.get("fine_tune_type", "lora")
    if kind not in KINDS:
        found.problems.append(misfit("fine_tune_type", kind, f"choose one of {', '.join(KINDS)}"))
        return
    found.choose(given, "method", "full" if kind == "full" else "lora", "fine_tune_type")
    if kind == "dora":
        found.give("use_dora", True, "fine_tune_type")
    if kind != "full":
        _adapter(given, found)
        _last(given, found)
        if adapters := found.read(given, "resume_adapter_file", names):
            found.go_on(adapters, "resume_adapter_file")
    elif "resume_adapter_file" in given:
        found.problems.append("resume_adapter_file goes with fine_tune_type: lora or dora")
    elif given.get("num_layers", LAYERS) != -1:
        found.problems.append("num_layers goes with an adapter; give num_layers: -1, or freeze")
    masked = found.read(given, "mask_prompt", truth)
    found.choose(given, "train_on", "last" if masked else "all", "mask_prompt")
    _optimizer(given, found)
    batches = found.read(given, "grad_accumulation_steps", number) or 1
    for name, key in (("iters", "max_steps"), ("save_every", "eval_every")):
        count = found.read(given, name, number)
        if count is not None:
            found.give(key, max(1, int(count // batches)), name)
    if "iters" not in given:
        found.usual["max_steps"] = max(1, int(ITERS // batches))
    found.notes.append(
        "rows of prompt and completion are plain texts here and chat turns in mlx-lm; columns: "
        "{prompt: prompt, response: completion} makes them turns"
    )


def _adapter(given: Values, found: Found) -> None:
    settings = given.get("lora_parameters", {})
    if not isinstance(settings, dict):
        found.problems.append("lora_parameters must be a mapping with rank, scale and dropout")
        return
    found.problems += [
        f"lora_parameters: unknown key {printable(str(key))}; known are {', '.join(SETTINGS)}"
        for key in settings
        if key not in SETTINGS
    ]
    rank, scale = found.read(settings, "rank", number), found.read(settings, "scale", number)
    alpha = found.read(settings, "alpha", number)
    rank = RANK if rank is None else rank
    usual = SCALE if alpha is None else OLD_SCALE
    scale = usual if scale is None else scale
    found.choose(given, "r", rank, "lora_parameters")
    found.choose(given, "lora_alpha", scale * (rank if alpha is None else alpha), "lora_parameters")
    if settings.get("dropout") is not None:
        found.give("lora_dropout", settings["dropout"], "lora_parameters")
    if settings.get("keys") is not None:
        found.give("target_modules", found.read(settings, "keys", layers), "lora_parameters")


def _last(given: Values, found: Found) -> None:
    """Turn the number of last layers into their indices, for which the model must be known."""
    count = found.read(given, "num_layers", number)
    count = LAYERS if count is None else count
    if not isinstance(count, int) or (count < 1 and count != -1):
        found.problems.append(misfit("num_layers", count, "must be a number of layers, or -1"))
        return
    if count == -1 or "model" not in given:
        return
    name = str(given["model"])
    trust = found.values.get("trust_remote_code", False)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except LOADING as error:
        raise cannot_load(name, error, "AutoModelForCausalLM") from error
    total = config.get_text_config().num_hidden_layers
    if count < total:
        indices = list(range(total - count, total))
        found.give("layers_to_transform", indices, "num_layers")


def _optimizer(given: Values, found: Found) -> None:
    asked = given.get("optimizer", "adam")
    if asked not in ("adam", "adamw"):
        found.problems.append(misfit("optimizer", asked, "choose adam or adamw"))
    found.usual["weight_decay"] = 0.01 if asked == "adamw" else 0.0
    found.notes.append("Adam's averages are corrected for their start, which they are not there")


TOOL = Tool(
    "mlx-lm",
    frozenset({"fine_tune_type", "lora_parameters", "iters", "adapter_path", "mask_prompt"}),
    KEYS,
    DEFAULTS,
    join,
)
