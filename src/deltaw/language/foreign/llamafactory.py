"""The YAML that `llamafactory-cli train` takes.

Source: github.com/hiyouga/LLaMA-Factory, src/llamafactory/hparams.
"""

from pathlib import Path
from typing import Any

from deltaw.language.encoding.naming import SAME
from deltaw.language.foreign import arguments, deepspeed
from deltaw.language.foreign.llamafactory_keys import KEYS, SCORED
from deltaw.language.foreign.tool import Found, Tool, Values, misfit, names, number, truth

STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto"}
"""The task that a stage is; the others are not there yet."""
LATER = ("rm", "ppo")
METHODS = ("lora", "full", "freeze")
QWEN = ("chatml", "qwen", "qwen3")
"""The templates that write tools and calls of them as LLaMA-Factory's tool_format qwen does."""

DEFAULTS: dict[str, Any] = arguments.DEFAULTS | {
    "validation_share": 0.0,
    "gradient_checkpointing": True,
    "dataset_dir": "data",
}
GALORE_RANK = 16
PASSES = 16


def join(given: Values, found: Found) -> None:
    """Read what several keys say together."""
    stage = given.get("stage", "sft")
    if not isinstance(stage, str) or stage not in STAGES:
        found.stop(_stage(stage))
        return
    found.choose(given, "task", STAGES[stage], "stage")
    arguments.join(given, found)
    method = given.get("finetuning_type", "lora")
    if method not in METHODS:
        known = "choose lora, full or freeze"
        found.problems.append(misfit("finetuning_type", method, known))
        return
    found.choose(given, "method", method, "finetuning_type")
    if method == "freeze":
        _freeze(given, found)
    _start(given, found)
    _adapter(given, found)
    _learnt(given, found)
    _answered(given, found)
    _galore(given, found)
    _memory(given, found)
    deepspeed.join(given, found)
    _tools(given, found)
    _data(given, found)


def _stage(stage: Any) -> str:
    if stage in LATER:
        return f"stage={stage} is not there yet; there are pt, sft, dpo and kto"
    return misfit("stage", stage, "choose pt, sft, dpo or kto")


def _freeze(given: Values, found: Found) -> None:
    count = found.read(given, "freeze_trainable_layers", number)
    if count is not None:
        found.give("last_layers", count, "freeze_trainable_layers")
    found.notes.append("an output head of its own is trained as well, which it is not there")


def _start(given: Values, found: Found) -> None:
    passes = found.read(given, "pissa_iter", number)
    if found.read(given, "pissa_init", truth):
        passes = PASSES if passes is None else passes
        start = "pissa_exact" if passes == -1 else f"pissa_niter_{passes}"
        found.give("init_lora_weights", start, "pissa_init")


def _adapter(given: Values, found: Found) -> None:
    """Read which adapters the run begins with; with a new one, all of them are merged."""
    new = found.read(given, "create_new_adapter", truth)
    adapters = found.read(given, "adapter_name_or_path", names)
    if adapters is None:
        found.ignored += sorted(given.keys() & {"adapter_folder", "create_new_adapter"})
        return
    if "adapter_folder" in given:
        adapters = [str(Path(path, str(given["adapter_folder"]))) for path in adapters]
    if given.get("finetuning_type", "lora") != "lora":
        found.give("adapter", adapters, "adapter_name_or_path")
    elif new:
        found.give("adapter", adapters, "adapter_name_or_path")
        found.give("create_new_adapter", True, "create_new_adapter")
    else:
        found.go_on(adapters, "adapter_name_or_path")


def _learnt(given: Values, found: Found) -> None:
    for name, learnt in (("train_on_prompt", "all"), ("mask_history", "last")):
        if found.read(given, name, truth):
            found.give("train_on", learnt, name)
    packing, neat = (found.read(given, name, truth) for name in ("packing", "neat_packing"))
    if packing is False and neat:
        found.problems.append("packing=False and neat_packing=True contradict each other; keep one")
    elif packing or neat or (packing is None and given.get("stage") == "pt"):
        name = "neat_packing" if neat else "packing" if packing else "stage"
        found.give("packing", True, name)
        if not neat:
            found.notes.append("packed documents do not see each other, as with neat_packing there")


def _answered(given: Values, found: Found) -> None:
    if found.read(given, "predict_with_generate", truth) and "metric" not in found.values:
        found.notes.append(
            "predict_with_generate: the answers of the run are scored by deltaw eval RUN --generate"
        )
    for name in (*SCORED, "generation_num_beams"):
        value = found.read(given, name, number)
        if value is not None and given.get("stage", "sft") == "sft":
            found.give("num_beams" if "beams" in name else name, value, name)
        elif value is not None:
            found.ignored.append(name)


def _galore(given: Values, found: Found) -> None:
    use, layerwise = (found.read(given, name, truth) for name in ("use_galore", "galore_layerwise"))
    if layerwise and not use:
        found.problems.append("galore_layerwise has no effect without use_galore: true")
    elif use and given.get("finetuning_type", "lora") == "lora":
        found.problems.append("use_galore needs finetuning_type: full or freeze")
    elif use and found.values.get("optim", "adamw") != "adamw":
        found.problems.append("optim and use_galore contradict each other; keep one")
    elif use:
        found.values.pop("optim", None)
        found.give("optim", "galore_adamw" + "_layerwise" * bool(layerwise), "use_galore")
        found.usual["galore_rank"] = GALORE_RANK


def _memory(given: Values, found: Found) -> None:
    if found.read(given, "pure_bf16", truth):
        found.give("bf16", True, "pure_bf16")
    frozen = given.get("finetuning_type", "lora") == "lora"
    if found.read(given, "upcast_layernorm", truth) and frozen and found.values.get("bf16"):
        found.problems.append(
            "upcast_layernorm: true with bf16 would keep the norms alone in float32; keep one, "
            "without bf16 they are in float32 too"
        )
    off = found.read(given, "disable_gradient_checkpointing", truth)
    if off is not None:
        found.give("gradient_checkpointing", not off, "disable_gradient_checkpointing")


def _tools(given: Values, found: Found) -> None:
    asked, template = given.get("tool_format"), str(given.get("template"))
    if asked is not None and (asked != "qwen" or SAME.get(template, template) not in QWEN):
        known = f"only qwen is written, by the templates {', '.join(QWEN)}; the template decides"
        found.problems.append(misfit("tool_format", asked, known))


def _data(given: Values, found: Found) -> None:
    folder = given.get("dataset_dir")
    if folder == "ONLINE":
        found.usual.pop("dataset_dir")
    elif isinstance(folder, str) and folder.startswith("REMOTE:"):
        found.problems.append(misfit("dataset_dir", folder, "download it, and give the folder"))
    elif folder is not None:
        found.give("dataset_dir", folder, "dataset_dir")
    if "max_samples" in given:
        found.give("max_samples", given["max_samples"], "max_samples")
        found.notes.append("max_samples are drawn by the seed; there they are the first ones")


TOOL = Tool(
    "LLaMA-Factory",
    frozenset({"model_name_or_path", "stage", "finetuning_type"}),
    KEYS,
    DEFAULTS,
    join,
)
