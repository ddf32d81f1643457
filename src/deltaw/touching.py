"""What a merge would change of a layer, and what forbids that."""

from collections.abc import Iterator

from torch import Tensor

from deltaw.authority import Active
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.offload import is_sharded
from deltaw.sharing import Shared
from deltaw.tables import Owner


def refusals(
    path: str,
    layer: AdaptedLayer,
    active: Active,
    shared: Shared,
    untie: bool,
) -> Iterator[str]:
    """Yield what keeps the active adapters from being written into a layer."""
    for name in touched(layer, active):
        tensor = _held(layer, name)
        where = f"{path}.{name}"
        if tensor is None:
            yield f"{where}: the layer has no bias to hold the adapter's; use lora_bias=False"
        elif tensor.is_meta:
            yield f"{where} is on the meta device; load the weights (remove offloading) first"
        elif is_sharded(tensor):
            yield f"{where} is sharded; merge before sharding"
        elif owner_of(layer, name) in shared and not untie:
            others = ", ".join(shared[owner_of(layer, name)])
            yield f"{where} is tied to {others}, which would change too; pass untie=True to copy it"
        if getattr(layer, "max_norm", None) is not None and name == WEIGHT:
            yield f"{path}: max_norm renormalises the rows of the merged table differently"


def _held(layer: AdaptedLayer, name: str) -> Tensor | None:
    owner, own = layer.owner(name)
    return owner._parameters.get(own, owner._buffers.get(own))


def owner_of(layer: AdaptedLayer, name: str) -> Owner:
    """Return whose parameter or buffer `name` is, and what it is called there."""
    owner, own = layer.owner(name)
    return id(owner), own


def touched(layer: AdaptedLayer, active: Active) -> list[str]:
    """Return the parameters and buffers of a layer that the active adapters change.

    Zeros for a bias that the layer has not change nothing.
    """
    names: dict[str, None] = {}
    for key, _ in active:
        for slot, adapter in layer.parts(key).items():
            names[slot if adapter.replaces else layer.holder(slot)] = None
            shift, bias = adapter.bias_delta(), layer.bias_name(slot)
            if shift is None:
                continue
            if _held(layer, bias) is not None or shift.is_meta or shift.any():
                names[bias] = None
    return list(names)
