"""The names of PEFT on top of deltaw: `from deltaw.compat.peft import LoraConfig, get_peft_model`.

The model is adapted in place and stays itself, with its own parameter names; `PeftModel` is mixed
into its class, so there is no `base_model.model` in front of anything. Options of PEFT that say how
a model is loaded rather than what it computes are accepted and change nothing.

`transformers.Trainer` trains it, saves it, resumes it and loads its best checkpoint.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.compat.peft_config import LoraConfig, PeftConfig, TaskType
from deltaw.compat.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    as_peft,
    attach_config,
    refuse,
)
from deltaw.compat.peft_trainer import reload
from deltaw.errors import FormatError, raise_all
from deltaw.formats.peft import TENSORS
from deltaw.optim.loraplus import create_loraplus_optimizer

__all__ = [
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TaskType",
    "create_loraplus_optimizer",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """Return settings given by PEFT's names as a config, which it checks."""
    return LoraConfig(**config_dict)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> "PeftModel":
    """Adapt `model` in place and return it, now also a `PeftModel`.

    Entries of the settings that match nothing are warned of, as PEFT does not refuse them.

    Raises:
        ConfigError: listing every setting that is not supported or out of range.
    """
    refuse(mixed=mixed)
    if revision is not None:
        peft_config = replace(peft_config, revision=revision)
    attach_config(model, peft_config, adapter_name)
    return as_peft(model)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by the names they have in PEFT's files."""
    refuse(state_dict=state_dict)
    with TemporaryDirectory() as folder:
        deltaw.save(model, folder, adapter_name)
        return load_file(Path(folder) / TENSORS[0])


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Give one adapter the values that `get_peft_model_state_dict` returned.

    Raises:
        FormatError: listing every tensor that is missing, unexpected or misshapen.
    """
    refuse(ignore_mismatched_sizes=ignore_mismatched_sizes)
    own = get_peft_model_state_dict(model, None, adapter_name)
    given = {name: tensor.detach().clone() for name, tensor in peft_model_state_dict.items()}
    raise_all(
        FormatError,
        f"The state dict is not that of the adapter {adapter_name!r}:",
        [f"{name!r} is missing" for name in own if name not in given]
        + [f"{name!r} is unexpected" for name in given if name not in own]
        + [
            f"{name!r} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in given and given[name].shape != own[name].shape
        ],
        "give the model an adapter of the settings that the state dict was made with.",
    )
    with TemporaryDirectory() as folder:
        deltaw.save(model, folder, adapter_name)
        save_file(given, Path(folder) / TENSORS[0])
        reload(model, {adapter_name: Path(folder)})
