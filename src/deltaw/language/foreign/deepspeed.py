"""DeepSpeed's settings, of which only how weights are shared out acts here.

Source: deepspeed.ai/docs/config-json, and transformers' use of it, which fills in `auto`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import printable
from deltaw.language.foreign.tool import Around, Found, Joint, Values, misfit

FATE = Joint(
    "`fsdp`: true for ZeRO stage 3, false for 0 to 2; offloading, fp16, a scheduler or an "
    "optimiser other than AdamW in its file are refused"
)
LEARNT = "it would change what is learnt; leave it out"
MEMORY = "nothing is moved to the host's memory or to a disk; leave it out"
SPEED = (
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "activation_checkpointing",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "aio",
    "checkpoint",
    "disable_allgather",
    "sparse_gradients",
)
"""What is about speed, memory or what is shown."""
FSDP = {0: False, 1: False, 2: False, 3: True}
"""Whether a stage of ZeRO is `fsdp`."""


def join(given: Values, found: Found) -> None:
    """Read `deepspeed` behind all other keys, which its own are compared with."""
    name = "deepspeed"
    if given.get(name, "") in (False, "", [], {}):
        return
    try:
        settings = _settings(given[name], found.around)
    except ValueError as error:
        found.problems.append(misfit(name, given[name], str(error)))
        return
    problems = [f"{name}: {problem}" for problem in _problems(settings, found)]
    found.problems += problems
    if problems:
        return
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    found.give("fsdp", FSDP[stage], name)
    instead = "fsdp: true shares out the same" if FSDP[stage] else "every process holds all (DDP)"
    found.notes.append(f"deepspeed: ZeRO stage {stage}; DeepSpeed is not used, {instead}")


def _settings(value: Any, around: Around) -> Mapping[str, Any]:
    """Return what DeepSpeed's file says, which may stand in the other as well."""
    if isinstance(value, str):
        try:
            paths = [path for path in (around.folder / value, Path(value)) if path.is_file()]
            text = paths[0].read_text("utf-8-sig") if paths else None
            value = None if text is None else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON can be read there: {printable(str(error), 200)}") from error
        if text is None:
            raise ValueError("there is no such file, beside this one or in the working directory")
    if not isinstance(value, dict) or not isinstance(value.get("zero_optimization", {}), dict):
        raise ValueError("must be DeepSpeed's settings, or the path of a JSON file with them")
    return {str(key): held for key, held in value.items()}


def _problems(settings: Mapping[str, Any], found: Found) -> Iterator[str]:
    """Yield what is not done here, and what contradicts the file."""
    yield from _zero(settings.get("zero_optimization", {}))
    whole = found.usual | found.values | dict(found.own)
    rows, passes = whole["batch_size"], whole.get("gradient_accumulation", 1)
    if not isinstance(rows, int) or not isinstance(passes, int):
        return
    own = {
        "train_batch_size": rows * passes,
        "train_micro_batch_size_per_gpu": rows // found.around.processes,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": whole.get("max_grad_norm", 1.0),
    }
    for key, value in settings.items():
        if key in own:
            if value not in ("auto", own[key]):
                yield misfit(key, value, f"the file has {own[key]}; give auto")
        elif key in ("bf16", "bfloat16", "fp16"):
            enabled = value.get("enabled", False) if isinstance(value, dict) else value
            ours = key != "fp16" and bool(whole.get("bf16", False))
            if enabled not in ("auto", ours):
                fix = "give bf16: true instead" if key == "fp16" else f"the file has bf16: {ours}"
                yield misfit(f"{key}.enabled", enabled, fix)
        elif key == "optimizer":
            if not _is_plain(value):
                yield "optimizer: only AdamW with auto for all params; leave it out"
        elif key not in (*SPEED, "zero_optimization"):
            yield f"{printable(key)}: {LEARNT}"


def _zero(zero: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of ZeRO is not done here."""
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in FSDP:
        yield misfit("zero_optimization.stage", stage, "must be 0, 1, 2 or 3")
    for name, value in zero.items():
        key = str(name)
        device = value.get("device", "none") if isinstance(value, dict) else value
        if "offload" in key and device not in ("none", None, False):
            yield f"zero_optimization.{printable(key)}: {MEMORY}"
        elif key.startswith("zero_quantized") and value is not False:
            yield f"zero_optimization.{printable(key)}: {LEARNT}"


def _is_plain(optimizer: Any) -> bool:
    """Tell whether an optimiser is the AdamW that the file asks for by its own keys."""
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() != "adamw":
        return False
    params = optimizer.get("params", {})
    return isinstance(params, dict) and all(value == "auto" for value in params.values())
