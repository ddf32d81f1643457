"""PEFT's settings of an adapter: deltaw's own, and the names of all that deltaw has not.

A setting of a feature that is not supported is taken at its neutral value and refused at any other.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from deltaw.compat.peft_hub import adapter_folder
from deltaw.config import LoraConfig as Settings
from deltaw.errors import ConfigError, raise_all
from deltaw.formats._files import json_bytes, read_json, replace_files
from deltaw.formats._peft_read import FEATURES, parse
from deltaw.formats.peft import CONFIG

_UNSUPPORTED = {name: what for name, what in FEATURES.items() if name != "enable_lora"} | {
    "corda_config": "a CorDA start",
    "eva_config": "a config of an EVA start (init_lora_weights='eva_rho_2' says rho)",
    "loftq_config": "a LoftQ start",
    "lora_ga_config": "a LoRA-GA start",
}
# Settings that say what the tensors of a file do to the model.
_IN_TENSORS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
)
_NOT_IN_FILES = ("enable_lora", "method", "runtime_config")


class TaskType(StrEnum):
    """The tasks PEFT knows by name."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class _Fields(Settings):
    """The settings and their defaults, as PEFT has them."""

    adapts_new_heads: ClassVar[bool] = True

    lora_alpha: float | None = 8
    target_modules: str | Sequence[str] | None = None
    inference_mode: bool = False
    peft_type: str = "LORA"
    peft_version: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    runtime_config: object = None
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = 16
    alora_invocation_tokens: Sequence[int] | None = None
    arrow_config: object = None
    corda_config: object = None
    ensure_weight_tying: bool = False
    eva_config: object = None
    kasa_config: object = None
    layer_replication: Sequence[tuple[int, int]] | None = None
    loftq_config: object = field(default_factory=dict)
    lora_ga_config: object = None
    megatron_config: object = None
    monteclora_config: object = None
    use_bdlora: object = None
    use_qalora: bool = False
    velora_config: object = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r}: {what} is not supported"
            for name, what in _UNSUPPORTED.items()
            if getattr(self, name)
        ]
        if self.peft_type != "LORA":
            problems.append(f"peft_type={self.peft_type!r}: only 'LORA' is supported")
        raise_all(ConfigError, "LoraConfig cannot be used:", problems, "leave these out.")
        # Empty until the model is there to say which layers it has.
        object.__setattr__(self, "target_modules", self.target_modules or [])
        super().__post_init__()


class LoraConfig(_Fields):
    """deltaw's settings with PEFT's defaults: r = alpha = 8, and targets by model type.

    `modules_to_save=None` trains no module in full but those PEFT adds for the task: `classifier`
    and `score`, or `qa_outputs`. A setting may be assigned later, and is checked where it is used.

    Raises:
        ConfigError: listing every feature that is not supported, or setting that is out of range.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in {each.name for each in fields(self)}:
            raise AttributeError(f"LoraConfig has no setting {name!r}.")
        if name == "use_dora":
            object.__setattr__(self, "method", "dora" if value else "lora")
        object.__setattr__(self, name, value)

    def checked(self) -> "LoraConfig":
        """Return a copy with the settings as they are now; raise a ConfigError as when made."""
        return replace(self)

    @classmethod
    def of(cls, settings: Settings) -> "LoraConfig":
        """Return settings of deltaw, such as those of an adapter that was read, as PEFT's."""
        if isinstance(settings, cls):
            return settings
        return cls(**{each.name: getattr(settings, each.name) for each in fields(Settings)})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> "LoraConfig":
        """Read `adapter_config.json` alone, from a folder or from the hub.

        Raises:
            FormatError: if it is not there, or asks for what cannot be done.
        """
        place = (subfolder, revision, cache_dir, token)
        file = adapter_folder(pretrained_model_name_or_path, [CONFIG], *place) / CONFIG
        content = read_json(file)
        frozen = content.get("inference_mode") is True
        return replace(cls.of(parse(file, content)), inference_mode=frozen)

    def require_same(self, own: "LoraConfig") -> None:
        """Raise where these settings, given for an adapter, are not those of its own file."""
        raise_all(
            ConfigError,
            "config is not that of the adapter, whose file alone says what its tensors mean:",
            [
                f"{name} is {getattr(self, name)!r}, and {getattr(own, name)!r} there"
                for name in _IN_TENSORS
                if getattr(self, name) != getattr(own, name)
            ],
            "leave config out.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by PEFT's names, with None where a list is empty."""
        config = self.checked()
        values = {
            each.name: getattr(config, each.name)
            for each in fields(self)
            if each.name not in _NOT_IN_FILES
        }
        values["modules_to_save"] = values["modules_to_save"] or None
        if not config.target_parameters:
            values["target_modules"] = values["target_modules"] or None
        return values

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`, in which a local path of the base is left out.

        Raises:
            ConfigError: listing what was assigned and is not supported, or out of range.
            DeltawError: if it cannot be written.
        """
        content = self.to_dict()
        if os.path.exists(self.base_model_name_or_path or ""):
            content |= {"base_model_name_or_path": None, "revision": None}
        replace_files(Path(save_directory), {CONFIG: json_bytes(content)})


PeftConfig = LoraConfig
