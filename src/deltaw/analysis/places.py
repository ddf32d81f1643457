"""Where the weights of a model's layers lie in its checkpoint, for extracting an adapter."""

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from deltaw.combine import Place
from deltaw.geometry import WEIGHT
from deltaw.layers import ANY, geometry_of
from deltaw.planning import base_modules, refusals


def places(model: nn.Module) -> dict[str, Place]:
    """Return the layers of `model` that can be adapted; it may be on the meta device.

    Layers that share a weight, as an embedding and its output head do, name each other's keys. A
    checkpoint may call a weight otherwise than the model does, as transformers' own do.
    """
    stored = {own: name for name, own in renamed(model).items()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = base_modules(model)
    found = {}
    for path, module in layers.items():
        geometry, weight = geometry_of(module), module._parameters.get(WEIGHT)
        if geometry is None or weight is None or refusals(layers, path, ANY):
            continue
        keys = [f"{path}.{WEIGHT}", *names[id(weight)]]
        keys += [stored[key] for key in keys if key in stored]
        groups = module.groups if geometry.kind in ("conv", "conv_transpose") else 1
        found[path] = Place(geometry.kind, tuple(dict.fromkeys(keys)), groups)
    return found


def renamed(model: nn.Module) -> dict[str, str]:
    """Return the names that transformers stores single weights under, to those of the model."""
    found: dict[str, str] = {}
    if isinstance(model, PreTrainedModel):
        for name, parameter in model.named_parameters():
            stored = revert_weight_conversion(model, {name: parameter})
            found |= {other: name for other in stored if len(stored) == 1 and other != name}
    return found
