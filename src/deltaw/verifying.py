"""One batch through the model to prove that every adapter trains and takes effect."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter
from deltaw.errors import StateError, raise_all
from deltaw.layer import AdaptedLayer
from deltaw.optimizers import trains_nothing
from deltaw.root import adapted_layers, require_root


def verify(model: nn.Module, batch: Any, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Run one batch in training and in evaluation and raise where an adapter would be lost.

    Weights, gradients, buffers, random state and training mode are what they were afterwards.

    Args:
        model: an adapted, unmerged model.
        batch: the input: a mapping of keyword arguments, a tuple or list of positional ones, or one
            tensor.
            The loss is the output's `loss` where it has one, else the sum of squares of its
            floating-point tensors.
        optimizer: checked to hold every trainable parameter of the adapters.

    Raises:
        StateError: naming every active adapter whose forward never ran in training or in
            evaluation, that got no gradient, or whose ΔW changed nothing; an optimiser that would
            not train them; or if none is active, trainable, or holding its values.
    """
    root = require_root(model)
    root.authority.require_changeable("verify")
    found = dict(_active(adapted_layers(root)))
    _require_trainable(found)
    problems = _optimizer_problems(found, optimizer)
    with _unchanged(model), _random_deltas(found):
        model.train()
        ran = _ran(model, found, batch, train=True)
        problems += [
            f"{path}: its forward never ran in training" for path in found if path not in ran
        ]
        problems += [
            f"{path}: {name} got no gradient"
            for path, adapter in found.items()
            if path in ran
            for name, p in adapter.named_parameters()
            if p.requires_grad and _untrained(adapter, p)
        ]
        model.eval()
        ran = _ran(model, found, batch, train=False)
        problems += [
            f"{path}: its forward is not used without gradients"
            for path in found
            if path not in ran
        ]
        if found and not problems and _same_output(model, batch):
            problems.append("the adapters change nothing in the output")
    raise_all(
        StateError,
        "These adapters would not do what they should:",
        problems,
        "take such layers out of target_modules; something reads past their forward. For "
        "reentrant checkpointing call model.enable_input_require_grads().",
    )


def _require_trainable(found: Mapping[str, Adapter]) -> None:
    """Raise where no batch could tell anything about the adapters."""
    if not found:
        raise StateError(
            "No adapter is active, so there is nothing to verify.\n"
            "Fix: call deltaw.activate(model, name), outside of deltaw.disabled."
        )
    if not any(p.requires_grad for adapter in found.values() for p in adapter.parameters()):
        raise StateError(
            "No active adapter is trainable, so there is nothing to verify.\n"
            "Fix: attach or load it with trainable=True."
        )
    raise_all(
        StateError,
        "These adapters hold no values to train, being offloaded or on the meta device:",
        [path for path, adapter in found.items() if any(p.is_meta for p in adapter.parameters())],
        "offload first and attach then; remove_hook_from_submodules of accelerate.hooks undoes an "
        "offload.",
    )


def _untrained(adapter: Adapter, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter got no gradient; exact zeros are sound for a copy alone.

    A bias before a normalisation and that of attention keys have none by mathematics.
    """
    gradient = parameter.grad
    return gradient is None or not (adapter.replaces or gradient.any())


def _active(layers: Mapping[str, AdaptedLayer]) -> Iterator[tuple[str, Adapter]]:
    for path, layer in layers.items():
        for name, _ in layer.authority.current():
            for slot, adapter in layer.parts(name).items():
                yield f"{path}.{slot} ({name})", adapter


def _optimizer_problems(
    found: Mapping[str, Adapter], optimizer: torch.optim.Optimizer | None
) -> list[str]:
    if optimizer is None:
        return []
    if trains_nothing(optimizer):
        return ["the optimiser was built before attach and holds only frozen parameters"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        f"{path}: the optimiser does not hold {name}"
        for path, adapter in found.items()
        for name, p in adapter.named_parameters()
        if p.requires_grad and id(p) not in held
    ]


def _ran(model: nn.Module, found: Mapping[str, Adapter], batch: Any, *, train: bool) -> set[str]:
    """Return the adapters that took part in one pass; a trained copy does whenever it is read."""
    ran = {path for path, adapter in found.items() if adapter.replaces}
    hooks = [
        adapter.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path, adapter in found.items()
    ]
    try:
        if train:
            loss_of(call(model, batch)).backward()  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _same_output(model: nn.Module, batch: Any) -> bool:
    with torch.no_grad():
        adapted = tensors_of(call(model, batch))
        with require_root(model).authority.only(None):
            base = tensors_of(call(model, batch))
    return all(torch.equal(a, b) for a, b in zip(adapted, base, strict=True))


@contextlib.contextmanager
def _random_deltas(found: Mapping[str, Adapter]) -> Iterator[None]:
    """Add small random values to what is trained, so that it has an effect.

    A factor may be zero, or equal to the frozen start that is taken off it.
    """
    generator = torch.Generator().manual_seed(0)
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for adapter in found.values():
            for parameter in adapter.parameters():
                if parameter.requires_grad or not parameter.any() or adapter.replaces:
                    before.append((parameter, parameter.clone()))
                    noise = torch.randn(parameter.shape, generator=generator, device="cpu") * 1e-2
                    parameter.add_(noise.to(parameter))
        try:
            with torch.enable_grad():
                yield
        finally:
            for changed, old in before:
                changed.copy_(old)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers, training flags and random state."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    model.zero_grad()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)


def call(model: nn.Module, batch: Any) -> Any:
    """Return the output for keyword arguments in a mapping, positional ones in a row, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(output: Any) -> Tensor:
    """Return the loss in an output, or the sum of squares of its floating-point tensors."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        loss = sum(t.float().square().sum() for t in tensors_of(output) if t.requires_grad)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise StateError(
            "No output of the model depends on a trainable parameter: nothing would be trained.\n"
            "Fix: with reentrant checkpointing call model.enable_input_require_grads() first."
        )
    return loss


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []
