"""Dense weights in place of packed ones."""

import torch
from torch import nn

from deltaw.errors import MergeError, StateError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.quant import storage_of
from deltaw.swap import clear_bound_forward
from deltaw.unpacking import beside, forget_packing, usual_dtype
from deltaw.walking import walk


@torch.inference_mode(False)
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Give every layer with a packed weight a dense one in place; return their paths.

    The dense W is what the packed weight stands for, rounded once to `dtype`; what packing lost
    does not come back. After `merge(original="none")` and `detach` this makes a model that was
    trained on a packed base a plain one, also where some of its layers had no adapter.

    Args:
        model: a model without adapters, by `quantize` or transformers.
        dtype: of the dense weights and of their layers' biases. None is the dtype that each was
            packed from or, where that is not known, that of the model's first dense weight.

    Raises:
        StateError: if no weight is packed, or listing the layers that have adapters.
        MergeError: listing the layers whose weight has no dense form; nothing is changed then.
    """
    modules = dict(walk(model))
    found = {path: s for path, m in modules.items() if (s := storage_of(m)) is not None}
    name = type(model).__name__
    if not found:
        raise StateError(f"No weight of {name} is packed, so there is nothing to unpack.")
    raise_all(
        StateError,
        "Unpacking would change the weights under these adapted layers:",
        [path or name for path, module in modules.items() if isinstance(module, AdaptedLayer)],
        'deltaw.merge(model, original="none") and deltaw.detach(model) first.',
    )
    plain = {path: storage.plain(modules[path]) for path, storage in found.items()}
    raise_all(
        MergeError,
        f"{name} cannot be unpacked:",
        [
            f"{path}: {type(modules[path]).__name__} has no dense form"
            for path, kind in plain.items()
            if kind is None
        ],
        "load the model in full precision instead.",
    )
    usual = usual_dtype(model)
    for path, storage in found.items():
        layer, kind = modules[path], plain[path]
        assert kind is not None
        rebind = clear_bound_forward(layer, path)
        W = storage.read(layer).to(dtype or storage.dtype(layer) or usual)
        storage.unsettle(layer)
        for brought in storage.brings:
            vars(layer).pop(brought, None)
        layer.__class__ = kind
        layer._parameters[WEIGHT] = nn.Parameter(W, requires_grad=False)
        for bias in beside(layer, W.dtype).values():
            bias.data = bias.data.to(W.dtype)
        rebind()
    forget_packing(model)
    return tuple(found)
