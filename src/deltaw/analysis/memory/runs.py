"""A run of training as far as memory depends on it: what it packs, trains, computes and updates."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaw.analysis.memory.packing import Packing
from deltaw.analysis.memory.training import Training
from deltaw.attaching import attach
from deltaw.blocks import fuse_blocks
from deltaw.fusing import fuse_loss
from deltaw.optim import galore
from deltaw.recomputing import recompute

RATE = 1e-4
RUNTIME = 40 << 20
"""What torch and a trainer make once, in their first step; measured."""


class Run(ABC):
    """What is done to a model; every method is called on one whose tensors have no memory.

    `passes` counts the batches of a step, `clips` says whether the gradients' common norm is
    taken, `restores` whether a checkpoint is read again at the end; `runtime` is what is made once
    and beyond what the process has free already.
    """

    packs: Packing | None = None
    passes: int = 1
    clips: bool = True
    autocast: bool = False
    restores: bool = False
    runtime: int = RUNTIME

    @abstractmethod
    def adapt(self, model: nn.Module) -> None:
        """Freeze and adapt the model, and make it ready for training."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return what updates the weights that are trained."""

    def begin(self, model: nn.Module) -> None:
        """Do what is done once before the first step, without gradients; by default nothing."""
        return

    def before(self, model: nn.Module) -> None:
        """Do what is done before the loss of every batch, without gradients; by default nothing."""
        return

    @abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a batch."""

    def between(self, model: nn.Module) -> None:
        """Do what is done between steps, without gradients; by default nothing."""
        return


@dataclass
class TrainerRun(Run):
    """The run of transformers' Trainer that a `Training` describes."""

    training: Training

    def __post_init__(self) -> None:
        asked = self.training
        self.packs = Packing() if asked.method == "qlora" else None
        self.clips = not asked.layerwise
        self.autocast = asked.autocast

    def adapt(self, model: Any) -> None:
        """Attach the adapters, and what the training asks for."""
        asked = self.training
        model.config.use_cache = False
        model.train()
        if not asked.trains_all:
            attach(model, asked.adapter)
        if asked.fuse_loss:
            fuse_loss(model)
        if asked.fuse_blocks:
            fuse_blocks(model)
        if asked.checkpointing:
            recompute(model)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return AdamW in one fused step, or GaLore."""
        asked = self.training
        if asked.method == "galore":
            groups = galore.groups(model, asked.galore_rank)
            return galore.GaLoreAdamW(groups, lr=RATE, layerwise=asked.layerwise)
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=RATE, fused=True)

    def loss(self, model: Any) -> Tensor:
        """Return the model's own loss of random tokens."""
        asked = self.training
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (asked.rows, asked.tokens))
        labels = ids if asked.labels is None else torch.randint(asked.labels, (asked.rows,))
        loss: Tensor = model(input_ids=ids, labels=labels).loss
        return loss
