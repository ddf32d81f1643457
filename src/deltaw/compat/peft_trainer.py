"""The Trainer of transformers loads the checkpoints of a PeftModel, as it does for PEFT's own.

It writes them without help, but asks for the class of the `peft` package where it reads them. So
its two reading methods are put behind one question, once, when a model is made for training; what
they do with every other model stays as it was.
"""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

import deltaw
from deltaw.root import AdaptedModel


def prepare_trainer(kind: type[AdaptedModel]) -> None:
    """Have `transformers.Trainer` resume, and load the best checkpoint of, models of this kind."""
    if "transformers" not in sys.modules or find_spec("accelerate") is None:
        return
    from transformers import Trainer

    resume, load_best = Trainer._load_from_checkpoint, Trainer._load_best_model
    if resume.__module__ == __name__:
        return

    def is_ours(trainer: Trainer, model: nn.Module) -> bool:
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        return isinstance(model, kind) and not sharded

    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        model = self.model if model is None else model
        if is_ours(self, model):
            restore(model, Path(resume_from_checkpoint))
        else:
            resume(self, resume_from_checkpoint, model)

    def _load_best_model(self: Trainer, *arguments: Any) -> None:
        if is_ours(self, self.model):
            restore(self.model, Path(self.state.best_model_checkpoint))
        else:
            load_best(self, *arguments)

    Trainer._load_from_checkpoint = _load_from_checkpoint
    Trainer._load_best_model = _load_best_model


def restore(model: nn.Module, checkpoint: Path) -> None:
    """Give every adapter of `model` the values it has in a folder `save_pretrained` wrote."""
    names = deltaw.configs(model)
    reload(model, {n: checkpoint if n == "default" else checkpoint / n for n in names})


def reload(model: nn.Module, folders: Mapping[str, Path]) -> None:
    """Give each adapter the values in its folder; what is trained stays trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, folder in folders.items():
        deltaw.load(model, folder, name, swap=True, format="peft")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
