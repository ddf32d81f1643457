"""Loading a model and one step of training on fake tensors: what they allocate and free."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from deltaw.analysis.memory.fakes import give_memory, quiet
from deltaw.analysis.memory.headers import Weights
from deltaw.analysis.memory.packing import pack, template
from deltaw.analysis.memory.trace import Record, Trace
from deltaw.analysis.memory.training import Training
from deltaw.attaching import attach
from deltaw.blocks import fuse_blocks
from deltaw.fusing import fuse_loss
from deltaw.optim import galore

RATE = 1e-4
MAX_NORM = 1.0
"""The Trainer's limit on the norm of all gradients."""


def rehearse(model: Any, training: Training, weights: Weights | None) -> Record:
    """Return what loading this model, which is on the meta device, and a step allocate.

    The order is that of the Trainer: forward, backward, the norm of the gradients, AdamW in one
    fused step, gradients dropped. Attention is computed under a mask, as for a batch with padding:
    transformers does so where it cannot read whether there is any.
    """
    trace = Trace(getattr(model.config.get_text_config(), "vocab_size", 0))
    packs = training.method == "qlora"
    like = template() if packs else nn.Module()
    with warnings.catch_warnings(), quiet(), FakeTensorMode(allow_non_fake_inputs=True), trace:
        warnings.simplefilter("ignore")  # fakes warn of an address, which real tensors have
        with trace.phase("load", "weights"):
            give_memory(model, trace, weights)
            if packs:
                pack(model, like)
        with trace.phase("load", "adapters"):
            _prepare(model, training)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_gradient_of(trace))
        optimizer = _optimizer(model, training)
        _step(model, training, trace, trained, optimizer)
        states = [v for held in optimizer.state.values() for v in held.values()]
        for state in states:
            if isinstance(state, Tensor):
                trace.assign(state, "optimiser")
        return trace.record()


def _prepare(model: Any, training: Training) -> None:
    model.config.use_cache = False
    model.train()
    if not training.trains_all:
        attach(model, training.adapter)
    if training.fuse_loss:
        fuse_loss(model)
    if training.fuse_blocks:
        fuse_blocks(model)
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _optimizer(model: nn.Module, training: Training) -> Optimizer:
    if training.method == "galore":
        groups = galore.groups(model, training.galore_rank)
        return galore.GaLoreAdamW(groups, lr=RATE, layerwise=training.layerwise)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, fused=True)


def _gradient_of(trace: Trace) -> Callable[[Tensor], None]:
    def assign(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.assign(parameter.grad, "gradients")

    return assign


def _step(
    model: Any,
    training: Training,
    trace: Trace,
    trained: list[nn.Parameter],
    optimizer: Optimizer,
) -> None:
    with trace.phase("forward", "temporaries"):
        batch = _batch(model, training)
        with torch.autocast("cpu", torch.bfloat16, enabled=training.autocast):
            loss = model(**batch).loss
        for number in trace.alive():
            if trace.blocks[number].part == "temporaries":
                trace.blocks[number].part = "activations"
    with trace.phase("backward", "temporaries"):
        loss.backward()
        del loss
    with trace.phase("update", "temporaries"):
        if not training.layerwise:
            torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()


def _batch(model: Any, training: Training) -> dict[str, Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (training.rows, training.tokens))
    if training.labels is None:
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": torch.randint(training.labels, (training.rows,))}
