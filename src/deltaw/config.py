"""What a user asks for, in PEFT's field names and meanings."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import ClassVar

from deltaw.errors import ConfigError, raise_all

BIAS_RULES = ("none", "all", "lora_only")
NAMES: dict[str, tuple[type, ...]] = {
    "bias": (str,),
    "method": (str,),
    "init_lora_weights": (str, bool),
    "task_type": (str, NoneType),
    "base_model_name_or_path": (str, NoneType),
    "revision": (str, NoneType),
}
"""The settings that are names, with the types that each may have."""
TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@dataclass(frozen=True)
class LoraConfig:
    """Settings of one LoRA adapter: `W' = W + (lora_alpha / r) B A`.

    Args:
        r: rank of ΔW in every adapted layer.
        lora_alpha: numerator of the scale; `None` means `2 r`, worked out once, so that
            `dataclasses.replace(config, r=64)` keeps the number that was found for the old r.
        target_modules: which layers are adapted. `"all-linear"` takes every linear layer and
            every `nn.MultiheadAttention` except the output head; a list holds names, each matching
            a module of that name or any module whose path ends in `.name`; any other string is a
            regular expression that must match the whole path.
        target_parameters: parameters adapted on their own, by names or ends of their paths, such as
            the stacked experts of a mixture, `["mlp.experts.gate_up_proj"]`; `rank_pattern` and
            `alpha_pattern` count for them, what selects modules does not.
        exclude_modules: layers taken out again, as a list of names or a regular expression.
        lora_dropout: probability of dropping an input of A during training, in [0, 1).
        bias: biases trained with the adapter: `"none"`, `"all"`, or `"lora_only"` for those of
            adapted layers.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv 2312.03732).
        use_dora: train a magnitude of every output beside the direction, as `method="dora"`, which
            `None` follows (arXiv 2402.09353).
        modules_to_save: modules trained in full beside the adapters. `None` finds the new head of
            a classification model; `[]` trains none.
        trainable_token_indices: tokens of which the rows of an embedding are trained, as a list for
            the input embedding or by the name of each; an output head of the same weight follows.
        init_lora_weights: `True` starts A Kaiming-uniform and B at zero, `"gaussian"` draws A from
            N(0, 1/r²); other names are the files of `deltaw/inits`, such as `"pissa"`, `"olora"`,
            `"eva"`. `False` draws A and B both at random, so the adapted model does not start at
            the base's output.
        layers_to_transform: indices of the blocks to adapt; `None` means all.
        layers_pattern: names of the block lists those indices count in; `None` finds them.
        rank_pattern: pattern -> rank for the layers whose path ends in a match of the pattern;
            the first that matches wins, `^` pins the start of the path.
        alpha_pattern: the same for `lora_alpha`.
        fan_in_fan_out: kept for files written by others; the layer's own class decides.
        lora_bias: train a bias on B, scaled with it.
        task_type: PEFT's task name, such as `"SEQ_CLS"`; not used by deltaw itself.
        base_model_name_or_path: hub name or folder of the base model.
        revision: revision of the base model on the hub.
        method: what the adapter does to W: a file of `deltaw/adapters`; an empty name is `"dora"`
            with `use_dora` and `"lora"` otherwise.
        enable_lora: pattern -> one flag per equal slice of a fused layer's output, as in
            `{"c_attn": [True, False, True]}`; only the slices marked are adapted. For
            `nn.MultiheadAttention` four flags mark q, k, v and out. A list alone holds for every
            adapted layer.

    Raises:
        ConfigError: listing every setting that is out of range or contradicts another.
    """

    adapts_new_heads: ClassVar[bool] = False
    """Whether `"all-linear"` takes the layers of a new head that is not trained in full."""

    r: int = 8
    lora_alpha: float | None = None
    target_modules: str | Sequence[str] | None = "all-linear"
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    method: str = ""
    enable_lora: Mapping[str, Sequence[bool]] | Sequence[bool] | None = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            object.__setattr__(self, setting.name, _plain(getattr(self, setting.name)))
        if isinstance(self.enable_lora, list):
            object.__setattr__(self, "enable_lora", {".*": self.enable_lora})
        if self.use_dora is None:
            object.__setattr__(self, "use_dora", self.method == "dora")
        raise_all(ConfigError, "LoraConfig cannot be used:", _type_problems(self))
        if not self.method:
            object.__setattr__(self, "method", "dora" if self.use_dora else "lora")
        problems = [
            *_rank_problems("r", self.r),
            *_alpha_problems("lora_alpha", self.lora_alpha),
            *(
                p
                for key, r in self.rank_pattern.items()
                for p in _rank_problems(f"rank_pattern[{key!r}]", r)
            ),
            *(
                p
                for key, a in self.alpha_pattern.items()
                for p in _alpha_problems(f"alpha_pattern[{key!r}]", a)
            ),
            *_other_problems(self),
        ]
        raise_all(ConfigError, "LoraConfig cannot be used:", problems)
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.r)

    def scale(self, r: int, alpha: float) -> float:
        """Return `alpha / r`, or with `use_rslora` `alpha / sqrt(r)` (arXiv 2312.03732)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _plain(value: object) -> object:
    """Return a number, path or collection of any library's as Python's own, fit for JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _type_problems(config: LoraConfig) -> list[str]:
    """Return what is of a wrong type; the values of the right type are checked after that."""
    names = (
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "layers_pattern",
    )
    problems = [
        f"{name} must hold names, got {value!r}"
        for name in names
        if not isinstance(value := getattr(config, name), (str, NoneType))
        and not (isinstance(value, list) and all(map(_is_text, value)))
    ]
    problems += [
        f"{name} must map patterns to values, got {value!r}"
        for name in ("rank_pattern", "alpha_pattern", "enable_lora")
        if not (isinstance(value := getattr(config, name), dict) and all(map(_is_text, value)))
        and not (name == "enable_lora" and value is None)
    ]
    problems += [
        f"{name} must be a name, got {value!r}"
        for name, kinds in NAMES.items()
        if not isinstance(value := getattr(config, name), kinds)
    ]
    problems += [
        f"{name} must be True or False, got {value!r}"
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
        if not isinstance(value := getattr(config, name), bool)
    ]
    problems += _token_problems(config.trainable_token_indices)
    blocks = config.layers_to_transform
    numbers = [blocks] if isinstance(blocks, int) else blocks
    if numbers is not None and not (
        isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
    ):
        problems.append(f"layers_to_transform must hold whole numbers, got {blocks!r}")
    return problems


def _token_problems(value: object) -> list[str]:
    lists = value.values() if isinstance(value, dict) else [value] if value is not None else []
    named = not isinstance(value, dict) or all(map(_is_text, value))
    if named and all(isinstance(ids, list) and all(map(_is_token, ids)) for ids in lists):
        return []
    return [
        "trainable_token_indices must hold the numbers of tokens, or map names of embeddings to "
        f"such lists, got {value!r}"
    ]


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _rank_problems(name: str, value: object) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return [f"{name} must be a whole number above 0, got {value!r}"]
    return []


def _alpha_problems(name: str, value: object) -> list[str]:
    if value is None and name == "lora_alpha":
        return []
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        return [f"{name} must be a number above 0, got {value!r}"]
    return []


def _other_problems(config: LoraConfig) -> list[str]:
    problems = []
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout must lie in [0, 1), got {dropout!r}")
    if config.use_dora != (config.method == "dora"):
        problems.append(
            f"use_dora={config.use_dora} contradicts method={config.method!r}; give one of "
            "them, or both to dataclasses.replace, which hands on what it is not given"
        )
    if config.task_type not in (None, *TASKS):
        problems.append(f"task_type must be one of {', '.join(TASKS)}, got {config.task_type!r}")
    if config.bias not in BIAS_RULES:
        problems.append(f"bias must be one of {', '.join(BIAS_RULES)}, got {config.bias!r}")
    problems += [
        f"{name} must be a list of names, got {value!r}"
        for name in ("modules_to_save", "target_parameters")
        if isinstance(value := getattr(config, name), str)
    ]
    others = (config.modules_to_save, config.target_parameters, config.trainable_token_indices)
    if config.target_modules is None and config.bias == "none" and not any(others):
        problems.append("target_modules is None: nothing would be trained")
    if config.layers_pattern is not None and config.layers_to_transform is None:
        problems.append("layers_pattern goes with layers_to_transform, which is not set")
    assert not isinstance(config.enable_lora, Sequence)
    for key, flags in (config.enable_lora or {}).items():
        known = isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags)
        if not known or not any(flags):
            problems.append(
                f"enable_lora[{key!r}] must hold one True or False per slice with at least one "
                f"True, got {flags!r}"
            )
    return problems
