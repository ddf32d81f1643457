"""Where the weights of a model's layers lie in its checkpoint, for extracting an adapter."""

from torch import nn

from deltaw.combine import Place
from deltaw.geometry import WEIGHT
from deltaw.layers import ANY, geometry_of
from deltaw.planning import base_modules, refusals


def places(model: nn.Module) -> dict[str, Place]:
    """Return the layers of `model` that can be adapted; it may be on the meta device.

    Layers that share a weight, as an embedding and its output head do, name each other's keys.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = base_modules(model)
    found = {}
    for path, module in layers.items():
        geometry, weight = geometry_of(module), module._parameters.get(WEIGHT)
        if geometry is None or weight is None or refusals(layers, path, ANY):
            continue
        keys = (f"{path}.{WEIGHT}", *names[id(weight)])
        groups = module.groups if geometry.kind in ("conv", "conv_transpose") else 1
        found[path] = Place(geometry.kind, tuple(dict.fromkeys(keys)), groups)
    return found
