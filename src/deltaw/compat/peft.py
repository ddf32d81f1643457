"""The names of PEFT on top of deltaw: `from deltaw.compat.peft import LoraConfig, get_peft_model`.

The model is adapted in place and stays itself, with its own parameter names; `PeftModel` is mixed
into its class, so there is no `base_model.model` in front of anything. Options of PEFT that say how
a model is loaded rather than what it computes are accepted and change nothing.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from torch import Tensor, nn

import deltaw
from deltaw.compat.peft_targets import default_targets, task_heads
from deltaw.config import LoraConfig as Settings
from deltaw.errors import ConfigError, FormatError
from deltaw.formats import peft as files
from deltaw.layer import AdaptedLayer
from deltaw.root import AdaptedModel
from deltaw.swap import swap


class TaskType(StrEnum):
    """The tasks PEFT knows by name."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class LoraConfig(Settings):
    """deltaw's settings with PEFT's defaults: r = alpha = 8, and targets by model type.

    `modules_to_save=None` trains no module in full but those PEFT adds for the task: `classifier`
    and `score`, or `qa_outputs`.
    """

    lora_alpha: float | None = 8
    target_modules: str | Sequence[str] | None = None
    inference_mode: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.use_dora:
            raise ConfigError("use_dora=True is not supported. Fix: leave it out.")
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ConfigError(f"task_type must be one of {', '.join(TaskType)}.")
        # Empty until the model is there to say which layers it has.
        object.__setattr__(self, "target_modules", self.target_modules or [])
        super().__post_init__()

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path) -> Settings:
        """Read the settings of an adapter folder or of an adapter on the hub."""
        return files.read(_folder(pretrained_model_name_or_path, None)).config


PeftConfig = LoraConfig


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    revision: str | None = None,
) -> "PeftModel":
    """Adapt `model` in place and return it, now also a `PeftModel`.

    Entries of the settings that match nothing are warned of, as PEFT does not refuse them.
    """
    if revision is not None:
        peft_config = replace(peft_config, revision=revision)
    _attach(model, peft_config, adapter_name)
    return _as_peft(model)


class PeftModel(AdaptedModel):
    """Mixin of an adapted model that gives it PEFT's methods."""

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
    ) -> "PeftModel":
        """Put the adapter at `model_id` on `model`, in evaluation mode unless it is trainable."""
        folder = _folder(model_id, subfolder)
        deltaw.load(model, folder, adapter_name, trainable=is_trainable, format="peft")
        return _as_peft(model if is_trainable else model.eval())

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
    ) -> None:
        """Put a further adapter on the model, which is not active before `set_adapter`."""
        PeftModel.from_pretrained(self, model_id, adapter_name, is_trainable, subfolder=subfolder)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Put a new adapter on the model, neither active nor trainable before `set_adapter`."""
        _attach(self, replace(peft_config, inference_mode=True), adapter_name)
        _as_peft(self)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, object] | None = None,
    ) -> None:
        """Write the adapters, or those selected: `default` here, the others in sub-folders."""
        for name in selected_adapters or self.peft_config if is_main_process else ():
            folder = Path(save_directory)
            deltaw.save(self, folder if name == "default" else folder / name, name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or the sum of several, the active and the only trainable one."""
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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Give the base's own output within a `with` block."""
        with deltaw.disabled(self):
            yield

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True
    ) -> None:
        """Write the active adapters, or those named, into the weights until `unmerge_adapter`."""
        if adapter_names is not None:
            deltaw.activate(self, dict.fromkeys(adapter_names, 1.0))
        deltaw.merge(self)

    def unmerge_adapter(self) -> None:
        """Give every weight its original bits back."""
        deltaw.unmerge(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Write the active adapters into the weights for good and return the plain model.

        NaN is refused whether or not `safe_merge` asks for it.
        """
        if adapter_names is not None:
            deltaw.activate(self, dict.fromkeys(adapter_names, 1.0))
        deltaw.merge(self, original="none")
        return self.unload()

    def unload(self) -> nn.Module:
        """Take all adapters off and return the plain model."""
        deltaw.detach(self)
        return self

    def get_base_model(self) -> nn.Module:
        """Return the model itself, which is never wrapped."""
        return self

    @property
    def peft_config(self) -> dict[str, Settings]:
        """Return the settings of all adapters by name."""
        return deltaw.configs(self)

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


def _attach(model: nn.Module, config: LoraConfig, name: str) -> None:
    heads = [*(config.modules_to_save or []), *task_heads(model, config.task_type)]
    config = replace(
        config,
        target_modules=config.target_modules or default_targets(model),
        modules_to_save=list(dict.fromkeys(heads)),
    )
    made = deltaw.attach(model, config, name, trainable=not config.inference_mode, strict=False)
    for text in made.warnings if made else ():
        warnings.warn(text, stacklevel=4)


def _as_peft(model: nn.Module) -> PeftModel:
    swap(model, PeftModel)
    assert isinstance(model, PeftModel)
    return model


def _frozen_biases(model: nn.Module) -> Iterator[Tensor]:
    """Yield the originals of biases that are trained where the module's weight is not."""
    for layer in model.modules():
        for name in layer.adapter if isinstance(layer, AdaptedLayer) else ():
            copied = [slot for slot, part in layer.parts(name).items() if part.replaces]
            if "weight" not in copied:
                yield from map(layer.frozen, copied)


def _folder(model_id: str | Path, subfolder: str | None) -> Path:
    """Return the folder of an adapter, fetched from the hub unless it is on the disk."""
    folder = Path(model_id, subfolder or "")
    if folder.exists():
        return folder
    from transformers.utils import cached_file

    names = (files.CONFIG, files.TENSORS[0])
    try:
        found = [cached_file(str(model_id), name, subfolder=subfolder or "") for name in names]
    except OSError as problem:
        raise FormatError(
            f"There is no folder {folder}, and the hub has no adapter of that name: {problem}"
        ) from problem
    return Path(found[0]).parent
