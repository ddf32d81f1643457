"""Loading a model and one step of training on fake tensors: what they allocate and free."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaw.analysis.memory.fakes import give_memory, quiet
from deltaw.analysis.memory.headers import Weights
from deltaw.analysis.memory.packing import pack, template
from deltaw.analysis.memory.runs import Run
from deltaw.analysis.memory.trace import Record, Trace

MAX_NORM = 1.0
"""The Trainer's limit on the norm of all gradients."""


def rehearse(model: nn.Module, run: Run, weights: Weights | None) -> Record:
    """Return what loading this model, which is on the meta device, and a step allocate.

    The order is that of the Trainer: forward and backward, twice where gradients are accumulated,
    the norm of the gradients, the optimiser's step, gradients dropped, and what comes between
    steps. Attention is computed under a mask, as for a batch with padding: transformers does so
    where it cannot read whether there is any.
    """
    with _faked(model, run, weights) as trace:
        with trace.phase("begin", "temporaries"), torch.no_grad():
            run.begin(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_gradient_of(trace))
        optimizer = run.optimizer(model)
        for _ in range(min(run.passes, 2)):
            _pass(model, run, trace)
        with trace.phase("update", "temporaries"):
            if run.clips:
                torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        with trace.phase("between", "temporaries"), torch.no_grad():
            run.between(model)
        for held in optimizer.state.values():
            for state in held.values():
                if isinstance(state, Tensor):
                    trace.assign(state, "optimiser")
        with trace.phase("end", "temporaries"):
            if run.restores:
                size = sum(p.nbytes for p in trained)
                trace.free(trace.allocate(size, "temporaries", mapped=True))
        return trace.record()


def load(model: nn.Module, run: Run, weights: Weights | None) -> None:
    """Load, pack and adapt this model, which is on the meta device, and do no more."""
    with _faked(model, run, weights):
        return


@contextmanager
def _faked(model: nn.Module, run: Run, weights: Weights | None) -> Iterator[Trace]:
    """Note what is allocated within, where the model is loaded, packed and adapted already."""
    trace = Trace(getattr(model.config.get_text_config(), "vocab_size", 0))  # type: ignore[operator]
    like = None if run.packs is None else template(run.packs)
    with warnings.catch_warnings(), quiet(), FakeTensorMode(allow_non_fake_inputs=True), trace:
        warnings.simplefilter("ignore")  # fakes warn of an address, which real tensors have
        with trace.phase("load", "weights"):
            give_memory(model, trace, weights)
            if run.packs is not None and like is not None:
                pack(model, like, run.packs)
        with trace.phase("load", "adapters"):
            run.adapt(model)
        yield trace


def _gradient_of(trace: Trace) -> Callable[[Tensor], None]:
    def assign(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.assign(parameter.grad, "gradients")

    return assign


def _pass(model: nn.Module, run: Run, trace: Trace) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.autocast)
    with trace.phase("before", "temporaries"), torch.no_grad(), autocast:
        run.before(model)
    with trace.phase("forward", "temporaries"):
        with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
            loss = run.loss(model)
        for number in trace.alive():
            if trace.blocks[number].part == "temporaries":
                trace.blocks[number].part = "activations"
    with trace.phase("backward", "temporaries"):
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
