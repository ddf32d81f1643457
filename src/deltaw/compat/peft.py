"""The names of PEFT on top of deltaw: `from deltaw.compat.peft import LoraConfig, get_peft_model`.

The model is adapted in place and stays itself, with its own parameter names; `PeftModel` is mixed
into its class, so there is no `base_model.model` in front of anything. Options of PEFT that say how
a model is loaded rather than what it computes are accepted and change nothing.

`transformers.Trainer` trains it, saves it, resumes it and loads its best checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.calibrating import Loss
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
from deltaw.errors import ConfigError, FormatError, raise_all
from deltaw.formats.peft import TENSORS
from deltaw.inits import kind_of
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
    "initialize_lora_eva_weights",
    "prepare_model_for_kbit_training",
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

    Entries of the settings that match nothing are warned of, as PEFT does not refuse them. Adapters
    train in float32, whatever `autocast_adapter_dtype` says.

    Raises:
        ConfigError: listing every setting that is not supported or out of range.
    """
    refuse(mixed=mixed)
    if revision is not None:
        peft_config = replace(peft_config, revision=revision)
    attach_config(model, peft_config, adapter_name)
    return as_peft(model)


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: None = None,
    forward_fn: Loss | None = None,
    prepare_model_inputs_fn: None = None,
    prepare_layer_inputs_fn: None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter of `init_lora_weights="eva"` from the batches of `dataloader`, read once.

    Its parameters are new ones: build the optimiser after this.

    Raises:
        ConfigError: if its start is another one, or the data are missing or tell too little.
    """
    refuse(
        eva_state_dict=eva_state_dict,
        prepare_model_inputs_fn=prepare_model_inputs_fn,
        prepare_layer_inputs_fn=prepare_layer_inputs_fn,
    )
    config = model.peft_config[adapter_name]
    if kind_of(config.init_lora_weights) != "from_inputs" or dataloader is None:
        raise ConfigError(
            "An EVA start needs a dataloader, and an adapter that waits for it.\n"
            'Fix: give the data, to an adapter of LoraConfig(init_lora_weights="eva").'
        )
    active, spare = deltaw.active(model), f"{adapter_name}_eva"
    attach_config(model, config, spare, dataloader, forward_fn)
    started = deltaw.capture(model, spare)
    deltaw.detach(model, adapter_name)
    deltaw.attach(model, started, adapter_name, trainable=not config.inference_mode)
    deltaw.detach(model, spare)
    deltaw.activate(model, active)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by the names they have in PEFT's files."""
    refuse(state_dict=state_dict)
    with TemporaryDirectory() as folder:
        deltaw.save(model, folder, adapter_name)
        return load_file(Path(folder) / TENSORS[0])


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Get a model with packed weights ready for training, the rest of it in float32.

    Raises:
        StateError: if none of its weights is packed.
    """
    refuse(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
    deltaw.prepare_quantized(model, float32=True, checkpointing=use_gradient_checkpointing)
    return model


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
