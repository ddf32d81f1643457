"""One adapter of a set of layers as a state."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter
from deltaw.adapters.dora import MAGNITUDE, DoraAdapter
from deltaw.adapters.lora import LoraAdapter
from deltaw.adapters.token_rows import TokenRowsAdapter
from deltaw.authority import Authority
from deltaw.fingerprint import adapted_weights, fingerprint
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.layers.conv import Conv
from deltaw.layers.conv_factored import FactoredConv
from deltaw.layers.experts import Experts
from deltaw.layers.linear import slice_slot
from deltaw.offload import stored
from deltaw.state import IDS, ROWS, LayerState, State, with_scales


def state_of(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], authority: Authority, name: str
) -> State:
    """Return the adapter `name` as tensors, which share memory with the model's, and settings."""
    held = {p: _layer_state(m, name) for p, m in layers.items() if name in m.adapter}
    states = {path: state for path, state in held.items() if state.tensors}
    if name not in authority.fingerprints and authority.merged is None:
        authority.fingerprints[name] = fingerprint(model, adapted_weights(states))
    return State(authority.configs[name], states, authority.fingerprints.get(name))


def _layer_state(layer: AdaptedLayer, name: str) -> LayerState:
    tensors: dict[str, Tensor] = {}
    kind = "module"
    scales: dict[str, float] = {}
    enabled: tuple[bool, ...] = ()
    for slot, adapter in layer.parts(name).items():
        if isinstance(adapter, LoraAdapter):
            if not (rank := adapter.rank):
                continue
            kind = layer.kind
            outer, enabled = _outer(slot, enabled) if kind != Experts.kind else (slot, ())
            scales[outer] = adapter.scale
            A = _values(adapter, "lora_A")[..., :rank, :]
            B = _values(adapter, "lora_B")[..., :rank]
            A, B = layer.pack(A, B)
            tensors[f"{outer}.lora_A"], tensors[f"{outer}.lora_B"] = A, B
            if adapter.twin:
                A0, B0 = layer.pack(_values(adapter, "start_A"), _values(adapter, "start_B"))
                tensors |= {f"{outer}.start_A": A0, f"{outer}.start_B": B0}
            tensors |= {
                f"{outer}.{key}": _values(adapter, key)
                for key, _ in adapter.named_parameters()
                if key not in ("lora_A", "lora_B")
            }
        elif isinstance(adapter, TokenRowsAdapter):
            if not adapter.follows:
                tensors |= {f"{slot}.{key}": _values(adapter, key) for key in (ROWS, IDS)}
        else:
            tensors[f"{slot}.trained"] = _values(adapter, "trained")
    if enabled:
        tensors |= _other_magnitudes(layer, name, enabled)
    factored = isinstance(layer, FactoredConv) and kind == "conv"
    groups = layer.groups if isinstance(layer, Conv) and kind == "conv" else 1
    kind = "fused" if enabled else kind
    state = LayerState(kind, tensors, 1.0, enabled, groups, factored)
    return with_scales(state, scales) if scales else state


def _other_magnitudes(
    layer: AdaptedLayer, name: str, enabled: tuple[bool, ...]
) -> dict[str, Tensor]:
    """Return DoRA's magnitudes of the slices that are not adapted, as a file of PEFT's has them."""
    if not any(isinstance(adapter, DoraAdapter) for adapter in layer.parts(name).values()):
        return {}
    wide = torch.promote_types(layer.frozen(WEIGHT).dtype, torch.float32)
    return {
        f"slice_{index}.{MAGNITUDE}": torch.linalg.vector_norm(
            layer.matrix(slice_slot(index, len(enabled))), dim=1, dtype=wide
        )
        for index, on in enumerate(enabled)
        if not on
    }


def _values(adapter: Adapter, name: str) -> Tensor:
    return stored(adapter, name).detach()


def _outer(slot: str, enabled: tuple[bool, ...]) -> tuple[str, tuple[bool, ...]]:
    """Return the slot's name in a state, and the flags of the slices with this one's set."""
    if not slot.startswith("slice_"):
        return slot, ()
    _, index, _, count = slot.split("_")
    flags = list(enabled or [False] * int(count))
    flags[int(index)] = True
    return f"slice_{index}", tuple(flags)
