"""Running a model on some data to see what its layers read and how its weights would move."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.inits import Run, See
from deltaw.kernels.merge import is_finite
from deltaw.layer import AdaptedLayer
from deltaw.root import find_root
from deltaw.state import State
from deltaw.switching import disabled
from deltaw.verifying import call

IGNORED = -100
"""The label of a token that no loss counts."""
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Batches for a start from data, and what runs the model on one and returns its loss."""

    data: Iterable[Any]
    loss: Loss | None = None

    def batches(self) -> Iterator[Any]:
        """Yield the batches; raise where there is none."""
        batch = None
        for batch in self.data:
            yield batch
        if batch is None:
            raise ConfigError("The data to start from hold no batch. Fix: give at least one.")

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch: that of the function given, or of the output."""
        if self.loss is not None:
            given: object = self.loss(model, batch)
            if isinstance(given, Tensor):
                return given
            raise ConfigError(
                f"loss must return a tensor to start from its gradient, not {given!r:.100}.\n"
                "Fix: return it before .item() or .backward()."
            )
        output = call(model, batch)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"The output of {type(model).__name__} has no loss to start from.\n"
                "Fix: give batches with labels, or loss=lambda model, batch: ..."
            )
        return found


def calibration_of(
    source: LoraConfig | State, data: Iterable[Any] | None, loss: Loss | None
) -> Calibration | None:
    """Return what `attach` was given to start from, or raise where it makes no sense."""
    if loss is not None and data is None:
        raise ConfigError("loss goes with data, and there are none.\nFix: give both, or neither.")
    if data is not None and isinstance(source, State):
        raise ConfigError(
            "A state starts from no data: it holds its factors.\nFix: leave data and loss out."
        )
    return None if data is None else Calibration(data, loss)


Layers = Mapping[str, tuple[nn.Module, AdaptedLayer, Mapping[str, str]]]
"""By path the module, the layer it is seen as, and its slots by the names of their sites."""


def inputs(model: nn.Module, calibration: Calibration, layers: Layers) -> Run:
    """Return what shows the inputs of every layer as rows (N, in), without those that are masked.

    Embeddings, whose inputs are no numbers, are left out.
    """

    def run(see: See) -> None:
        shown: list[Tensor | None] = [None]
        problems: list[str] = []

        def watch(path: str, layer: AdaptedLayer) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                rows = _rows(layer, args[0] if args else next(iter(kwargs.values())), shown[0])
                if is_finite(rows):
                    see(path, rows)
                else:
                    problems.append(f"{path}: its inputs hold NaN or Inf")

            return hook

        with contextlib.ExitStack() as stack:
            stack.enter_context(_base_alone(model))
            stack.enter_context(torch.no_grad())
            for path, (module, layer, _) in layers.items():
                if layer.zero_factor != "A":
                    hook = watch(path, layer)
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            for batch in calibration.batches():
                shown[0] = _counted(batch)
                if calibration.loss is not None:
                    calibration.loss(model, batch)
                else:
                    call(model, batch)
        _refuse(problems)

    return run


def gradients(model: nn.Module, calibration: Calibration, layers: Layers) -> Run:
    """Return what shows the gradient of every slot's weight (out, in), batch by batch.

    Each is freed before that of the next layer is there.
    """

    def run(see: See) -> None:
        held: dict[Tensor, list[str]] = {}
        for path, (module, _, _) in layers.items():
            weight = module._parameters[WEIGHT]
            assert weight is not None
            held.setdefault(weight, []).append(path)
        problems: list[str] = []

        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            for path in held[weight]:
                _, layer, slots = layers[path]
                if not is_finite(gradient):
                    problems.append(f"{path}: its gradient holds NaN or Inf")
                    continue
                own = layer._parameters
                layer._parameters = {**own, WEIGHT: gradient}  # type: ignore[dict-item]
                for slot, name in slots.items():
                    see(name, layer.matrix(slot))
                layer._parameters = own

        with contextlib.ExitStack() as stack:
            stack.enter_context(_base_alone(model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_alone_trained(model, held))
            for trained in held:
                handle = trained.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            for batch in calibration.batches():
                calibration.loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        _refuse(problems)

    return run


def _rows(layer: AdaptedLayer, x: Tensor, shown: Tensor | None) -> Tensor:
    """Return what A multiplies, as rows (N, in): of a convolution the patches of all groups."""
    if layer.kind in ("linear", "conv1d"):
        if shown is not None and shown.shape == x.shape[:-1]:
            return x[shown.to(x.device)]
        return x.reshape(-1, x.shape[-1])
    into, groups = layer.shape(WEIGHT)[1], getattr(layer, "groups", 1)
    eye = torch.eye(into, dtype=x.dtype, device=x.device)
    y = layer.low_rank(x, eye, eye.repeat(groups, 1), 1.0, WEIGHT)
    axis = -layer.per_output(eye.new_zeros(into * groups), WEIGHT).dim()
    return y.movedim(axis, -1).reshape(-1, into)


def _counted(batch: Any) -> Tensor | None:
    """Return where a batch of tokens is attended to and has a label, as far as it says so."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    attended = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    ids = batch.get("input_ids") if attended is None else attended
    if not isinstance(labels, Tensor) or ids is None or labels.shape != ids.shape:
        return attended
    labelled = labels != IGNORED
    return labelled if attended is None else attended & labelled


@contextlib.contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Run in evaluation and without the adapters that are there."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with disabled(model) if find_root(model) is not None else contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _alone_trained(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let the weights alone have gradients, and give all flags and gradients back."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    try:
        yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _refuse(problems: list[str]) -> None:
    raise_all(
        ConfigError,
        "The data to start from give numbers that are not finite:",
        list(dict.fromkeys(problems)),
        "look for broken rows in the data, or run the model in float32 or bfloat16.",
    )
