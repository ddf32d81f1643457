"""Where the weights of a model's layers lie in its checkpoint, for extracting an adapter."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from deltaw.combine import Place, Slot, attention_slots
from deltaw.geometry import WEIGHT
from deltaw.layers import ANY, geometry_of
from deltaw.layers.experts import Experts
from deltaw.planning import base_modules, refusals
from deltaw.swap import seen_as


def places(model: nn.Module) -> dict[str, Place]:
    """Return the layers of `model` that can be adapted; it may be on the meta device.

    Layers that share a weight, as an embedding and its output head do, name each other's keys. A
    checkpoint may call a weight otherwise than the model does, as transformers' own do. Stacks of
    experts are the parameters of three dimensions of modules that are called `experts`.
    """
    stored = {own: name for name, own in renamed(model).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)

    def called(slot: Slot) -> Slot:
        """Return the slot under all names of its parameter."""
        keys = [*slot.keys, *names[id(parameters[slot.keys[0]])]]
        keys += [stored[key] for key in keys if key in stored]
        return replace(slot, keys=tuple(dict.fromkeys(keys)))

    layers = base_modules(model)
    found = {path: _place(layers, path) for path in layers if path}
    return {
        path: replace(place, slots={name: called(slot) for name, slot in place.slots.items()})
        for path, place in found.items()
        if place is not None
    }


def _place(layers: Mapping[str, nn.Module], path: str) -> Place | None:
    """Return the place of a module under the model's own names, None where it has none."""
    module = layers[path]
    geometry = geometry_of(module)
    if geometry is None:
        stacks = [name for name, P in module.named_parameters(recurse=False) if P.dim() == 3]
        if path.rpartition(".")[2] != Experts.kind or not stacks:
            return None
        slots = {name: Slot((f"{path}.{name}",)) for name in stacks}
        return Place(Experts.kind, slots, transposed=seen_as(module, Experts).is_turned)
    if refusals(layers, path, ANY):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return Place(geometry.kind, attention_slots(path, module._qkv_same_embed_dim))
    if module._parameters.get(WEIGHT) is None:
        return None
    groups = module.groups if geometry.kind in ("conv", "conv_transpose") else 1
    return Place(geometry.kind, {WEIGHT: Slot((f"{path}.{WEIGHT}",))}, groups)


def renamed(model: nn.Module) -> dict[str, str]:
    """Return the names that transformers stores single weights under, to those of the model."""
    found: dict[str, str] = {}
    if isinstance(model, PreTrainedModel):
        for name, parameter in model.named_parameters():
            stored = revert_weight_conversion(model, {name: parameter})
            found |= {other: name for other in stored if len(stored) == 1 and other != name}
    return found
