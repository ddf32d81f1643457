"""A model on fake tensors: built from its configuration, its weights as they would be loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.analysis.memory.headers import Weights
from deltaw.analysis.memory.trace import Trace
from deltaw.analysis.memory.training import Training
from deltaw.errors import ConfigError, FormatError, RunError, printable, raise_all
from deltaw.heads import new_heads
from deltaw.patterns import within

LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What transformers raises for a configuration that is absent, damaged or unknown."""


def empty(name: str, training: Training, dtype: torch.dtype) -> nn.Module:
    """Return the model on the meta device, from its configuration alone.

    Raises:
        ConfigError: without transformers.
        RunError: if there is no such configuration, or its type is unknown.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"An estimate needs transformers, which cannot be imported: {error}\n"
            "Fix: pip install 'deltaw[train]', or give a model on the meta device."
        ) from error
    head: dict[str, Any] = {} if training.labels is None else {"num_labels": training.labels}
    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(name, **head)
            model: nn.Module = training.auto_class().from_config(config, dtype=dtype)
    except LOADING as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"The model {printable(name, 200)} cannot be built: {printable(first, 300)}\n"
            "Fix: give a folder written by save_pretrained, or a hub name (needs the network or "
            "the cache)."
        ) from error
    return model


def require_fit(model: nn.Module, weights: Weights) -> None:
    """Raise `FormatError`, listing all, if weights have other shapes than the model's own.

    A new head need not fit.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    problems, new = [], new_heads(model)
    for name, parameter in model.named_parameters():
        if within(name, new):
            continue
        held = weights.headers.get(name) or weights.headers.get(name.removeprefix(prefix))
        if held is not None and held.shape != tuple(parameter.shape):
            problems.append(
                f"{printable(name)}: {held.shape} in the files, {tuple(parameter.shape)} by the "
                "configuration"
            )
    raise_all(
        FormatError,
        f"The weights do not fit {type(model).__name__}:",
        problems,
        "use config.json and weights that were written by one save_pretrained.",
    )


def give_memory(model: nn.Module, trace: Trace, weights: Weights | None) -> None:
    """Give the model fake memory on the CPU, as loading it would, within a `FakeTensorMode`.

    Where no dtype changes, the weights are pages of their files, which stay with the process as
    long as any weight is in use. Else the files are mapped while they are converted.
    """
    dtype = next(p.dtype for p in model.parameters())
    size = 0 if weights is None else weights.nbytes
    file = trace.allocate(size, "weights", mapped=True)
    in_place = weights is not None and weights.dtype == dtype
    with trace.elsewhere(in_place):
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = made.setdefault(id(tensor), _fake(tensor))
    if not in_place:
        trace.free(file)


def _fake(tensor: Tensor) -> Any:
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(memory, requires_grad=tensor.requires_grad)
    return memory


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers logs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
