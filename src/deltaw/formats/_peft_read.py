"""`adapter_config.json` as LoraConfig."""

import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, FormatError, raise_all
from deltaw.formats._files import of_mlx, shown

# Settings of adapters that are more than LoRA; each is neutral where it is empty or false.
FEATURES = {
    "alora_invocation_tokens": "aLoRA (activation by invocation tokens)",
    "arrow_config": "Arrow routing",
    "enable_lora": "the fused layers of PEFT before 0.3",
    "ensure_weight_tying": "adapters tied between embedding and output head",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Only these starts change the base's own weights, which the tensors of the file then build on.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Settings of the start, which is never repeated, and notes of PEFT to itself.
IGNORED = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < sys.float_info.max
    )


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _tokens(value: object) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(map(_whole, ids)) for ids in lists)


def _text(value: object) -> bool:
    return value is None or isinstance(value, str)


@dataclass(frozen=True)
class _Key:
    """One setting of the file: PEFT's default, what it may be, and how to tell."""

    default: object
    what: str
    fits: Callable[[object], bool]


_KEYS = {
    "r": _Key(8, "a whole number", _whole),
    "lora_alpha": _Key(8, "a number", _number),
    "target_modules": _Key(None, "names or a pattern", lambda v: _text(v) or _names(v)),
    "target_parameters": _Key(None, "a list of names", lambda v: v is None or _names(v)),
    "trainable_token_indices": _Key(None, "numbers of tokens", lambda v: v is None or _tokens(v)),
    "exclude_modules": _Key(None, "names or a pattern", lambda v: _text(v) or _names(v)),
    "lora_dropout": _Key(0.0, "a number", _number),
    "bias": _Key("none", "a word", lambda v: isinstance(v, str)),
    "use_rslora": _Key(False, "true or false", lambda v: isinstance(v, bool)),
    "use_dora": _Key(False, "true or false", lambda v: isinstance(v, bool)),
    "modules_to_save": _Key(None, "a list of names", lambda v: v is None or _names(v)),
    "init_lora_weights": _Key(True, "true, false or a name", lambda v: isinstance(v, (bool, str))),
    "layers_to_transform": _Key(
        None,
        "block numbers",
        lambda v: v is None or _whole(v) or (isinstance(v, list) and all(map(_whole, v))),
    ),
    "layers_pattern": _Key(None, "names", lambda v: _text(v) or _names(v)),
    "rank_pattern": _Key(
        {},
        "patterns with whole numbers",
        lambda v: v is None or (isinstance(v, dict) and all(map(_whole, v.values()))),
    ),
    "alpha_pattern": _Key(
        {},
        "patterns with numbers",
        lambda v: v is None or (isinstance(v, dict) and all(map(_number, v.values()))),
    ),
    "fan_in_fan_out": _Key(False, "true or false", lambda v: isinstance(v, bool)),
    "lora_bias": _Key(False, "true or false", lambda v: isinstance(v, bool)),
    "task_type": _Key(None, "a word", _text),
    "base_model_name_or_path": _Key(None, "a name", _text),
    "revision": _Key(None, "a name", _text),
}


def parse(file: Path, content: Mapping[str, object]) -> LoraConfig:
    """Return the settings of an `adapter_config.json`, with PEFT's defaults where keys are absent.

    The start is not repeated, so `init_lora_weights` comes back True.

    Raises:
        FormatError: listing every feature that is not supported and every value of a wrong type.
    """
    if content.get("peft_type") != "LORA":
        raise _other_type(file, content)
    problems = [
        f"{key} = {reprlib.repr(content[key])}: {name} is not supported"
        for key, name in FEATURES.items()
        if content.get(key)
    ]
    values = {key: content.get(key, rule.default) for key, rule in _KEYS.items()}
    problems += [
        f"{key} must be {rule.what}, not {reprlib.repr(values[key])}"
        for key, rule in _KEYS.items()
        if not rule.fits(values[key])
    ]
    start = values["init_lora_weights"]
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights = {start!r}: this start changed the base's weights, so the adapter "
            "is right on no other base; have it saved as a plain one (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    raise_all(FormatError, f"{shown(file)} asks for what cannot be done:", problems)
    _warn(file, content)
    del values["init_lora_weights"]
    values["modules_to_save"] = values["modules_to_save"] or []
    for key in ("rank_pattern", "alpha_pattern"):
        values[key] = values[key] or {}
    for key in ("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"):
        values[key] = None if values[key] in ("", []) else values[key]
    values["target_modules"] = values["target_modules"] or []
    try:
        return LoraConfig(**values)  # type: ignore[arg-type]
    except ConfigError as problem:
        raise FormatError(f"{shown(file)}: {problem}") from problem


def _other_type(file: Path, content: Mapping[str, object]) -> FormatError:
    if "fine_tune_type" in content or "lora_parameters" in content:
        return of_mlx(file)
    found = content.get("peft_type")
    if found is None:
        return FormatError(f"{shown(file)} has no peft_type, so it is not a PEFT adapter.")
    return FormatError(f"{shown(file)}: peft_type is {reprlib.repr(found)}; only 'LORA' is read.")


def _warn(file: Path, content: Mapping[str, object]) -> None:
    unknown = sorted(content.keys() - _KEYS.keys() - FEATURES.keys() - IGNORED - {"peft_type"})
    if unknown:
        warnings.warn(
            f"{shown(file)} has settings that are not known and were ignored: "
            f"{', '.join(map(repr, unknown))}. A later version of PEFT may have made it.",
            stacklevel=5,
        )
