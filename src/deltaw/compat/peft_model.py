"""PEFT's `PeftModel`, mixed into the class of an adapted model."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import deltaw
from deltaw.calibrating import Loss
from deltaw.compat.peft_combining import CombiningModel
from deltaw.compat.peft_config import LoraConfig
from deltaw.compat.peft_hub import adapter_folder
from deltaw.compat.peft_merging import MergingModel
from deltaw.compat.peft_rows import MixedBatchModel
from deltaw.compat.peft_targets import default_targets, heads
from deltaw.compat.peft_trainer import prepare_trainer
from deltaw.errors import ConfigError, raise_all
from deltaw.formats.peft import CONFIG, TENSORS
from deltaw.inits import kind_of
from deltaw.layer import AdaptedLayer
from deltaw.root import require_root
from deltaw.swap import swap


class PeftModel(MergingModel, MixedBatchModel, CombiningModel):
    """Mixin of an adapted model that gives it PEFT's methods."""

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        torch_device: str | None = None,
        torch_dtype: object = None,
        dtype: object = None,
        device_map: object = None,
        max_memory: object = None,
        offload_folder: str | Path | None = None,
    ) -> "PeftModel":
        """Put the adapter at `model_id` on `model`, in evaluation mode unless it is trainable.

        The adapter goes where its layer is, in float32; `config` may only repeat the file's.
        """
        refuse(key_mapping=key_mapping)
        place = (subfolder, revision, cache_dir, token)
        folder = adapter_folder(model_id, (CONFIG, TENSORS[0]), *place)
        if config is not None:
            LoraConfig.of(config).require_same(LoraConfig.from_pretrained(folder))
        deltaw.load(model, folder, adapter_name, trainable=is_trainable, format="peft")
        return as_peft(model if is_trainable else model.eval())

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        device_map: object = None,
        max_memory: object = None,
        offload_folder: str | Path | None = None,
    ) -> None:
        """Put a further adapter on the model, which is not active before `set_adapter`.

        An adapter of that name is replaced, and stays active or not as it was.
        """
        refuse(key_mapping=key_mapping)
        place = (subfolder, revision, cache_dir, token)
        folder = adapter_folder(model_id, (CONFIG, TENSORS[0]), *place)
        there = adapter_name in deltaw.configs(self)
        deltaw.load(self, folder, adapter_name, trainable=is_trainable, swap=there, format="peft")
        as_peft(self if is_trainable else self.eval())

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put a new adapter on the model, neither active nor trainable before `set_adapter`."""
        attach_config(self, replace(peft_config, inference_mode=True), adapter_name)
        as_peft(self)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: dict[str, object] | None = None,
        save_function: object = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write the adapters, or those selected: `default` here, the others in sub-folders.

        The files are safetensors, written from the model itself, whatever else is asked for.
        """
        refuse(
            save_embedding_layers=save_embedding_layers is True,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            push_to_hub=push_to_hub,
        )
        for name in selected_adapters or self.peft_config if is_main_process else ():
            folder = Path(save_directory)
            self.peft_config[name].checked()
            deltaw.save(self, folder if name == "default" else folder / name, name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or the sum of several, the active and the only trainable one.

        Merged adapters are unmerged first.
        """
        if self.authority.merged is not None:
            warnings.warn("Adapters are merged and are unmerged first.", stacklevel=2)
            deltaw.unmerge(self)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        deltaw.activate(self, dict.fromkeys(names, 1.0))
        for layer in self.modules():
            if isinstance(layer, AdaptedLayer):
                for name, parts in layer.adapter.items():
                    parts.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter off; if it was the active one, the first that is left becomes active."""
        deltaw.detach(self, adapter_name)
        rest = list(deltaw.configs(self))
        if rest and not deltaw.active(self):
            warnings.warn(f"{adapter_name} was active; now {rest[0]} is.", stacklevel=2)
            self.set_adapter(rest[0])

    def get_base_model(self) -> nn.Module:
        """Return the model itself, which is never wrapped."""
        return self

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Return the settings of all adapters by name, as the model keeps them."""
        kept = self.authority.configs
        own = {name: LoraConfig.of(settings) for name, settings in kept.items()}
        kept.update(own)
        return own

    @property
    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return list(deltaw.active(self))

    @property
    def active_adapter(self) -> str | list[str]:
        """Return the name of the active adapter, or the names where there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained, and how many PEFT counts in all.

        That is with the frozen originals of modules trained in full, but not of single biases.
        """
        parameters = list(self.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        biases = {id(p): p for p in _frozen_biases(self)}.values()
        return trained, sum(p.numel() for p in parameters) - sum(p.numel() for p in biases)

    def print_trainable_parameters(self) -> None:
        """Print the line that PEFT prints."""
        trained, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} "
            f"|| trainable%: {100 * trained / total:.4f}"
        )


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` whose first adapter is for SEQ_CLS."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` whose first adapter is for SEQ_2_SEQ_LM."""


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` whose first adapter is for CAUSAL_LM."""


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` whose first adapter is for TOKEN_CLS."""


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` whose first adapter is for QUESTION_ANS."""


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` whose first adapter is for FEATURE_EXTRACTION."""


_BY_TASK = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def refuse(**options: object) -> None:
    """Raise a ConfigError that lists the options that were given and are not supported."""
    raise_all(
        ConfigError,
        "Options that are not supported:",
        [f"{name}={value!r}" for name, value in options.items() if value],
        "leave them out.",
    )


def attach_config(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    data: Iterable[Any] | None = None,
    forward: Loss | None = None,
) -> None:
    """Put a new adapter on `model` where PEFT would, and warn of settings that match nothing.

    Without data a start from inputs is one of zeros, which `initialize_lora_eva_weights` replaces.
    """
    start = config.init_lora_weights
    waits = data is None and kind_of(start) == "from_inputs"
    config = replace(
        config,
        target_modules=config.target_modules
        or ([] if config.target_parameters else default_targets(model)),
        modules_to_save=heads(model, config.modules_to_save, config.task_type),
        init_lora_weights=True if waits else start,
    )
    made = deltaw.attach(
        model,
        config,
        name,
        trainable=not config.inference_mode,
        strict=False,
        data=data,
        loss=forward,
    )
    own = require_root(model).authority.configs
    own[name] = replace(own[name], init_lora_weights=start)
    for text in made.warnings if made else ():
        warnings.warn(text, stacklevel=3)


def as_peft(model: nn.Module) -> PeftModel:
    """Mix the class for the task of its first adapter into an adapted model."""
    task = next(iter(deltaw.configs(model).values())).task_type
    swap(model, _BY_TASK.get(task or "", PeftModel))
    assert isinstance(model, PeftModel)
    if any(parameter.requires_grad for parameter in model.parameters()):
        prepare_trainer(PeftModel)
    return model


def _frozen_biases(model: nn.Module) -> Iterator[Tensor]:
    """Yield the originals of biases that are trained where the module's weight is not."""
    for layer in model.modules():
        for name in layer.adapter if isinstance(layer, AdaptedLayer) else ():
            copied = [slot for slot, part in layer.parts(name).items() if part.replaces]
            if "weight" not in copied:
                yield from map(layer.frozen, copied)
