"""`deltaw_start.safetensors`: what splits factors of rank 2r into an adapter and its start again.

An adapter whose start B0 A0 is subtracted is written as A' = [A; A - A0] and B' = [B - B0, B0],
which every reader takes for a plain one. To train it on, A0 and B are needed to the last bit.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltaw.formats._files import read_tensors
from deltaw.state import LayerState, State, without_twin

NAME = "deltaw_start.safetensors"


def kept(state: State) -> dict[str, Tensor]:
    """Return A0 and B of every slot that has a start, by `path:slot.name`."""
    return {
        f"{path}:{name}": tensor
        for path, layer in state.layers.items()
        for name, tensor in layer.tensors.items()
        if name.endswith(".start_A") or f"{name.removesuffix('lora_B')}start_B" in layer.tensors
    }


def restored(layers: Mapping[str, LayerState], folder: Path) -> dict[str, LayerState]:
    """Return the layers with their starts apart, where the file in `folder` fits their factors.

    It does not where another program has changed these; they are right as they are then.
    """
    file = folder / NAME
    if not file.is_file():
        return dict(layers)
    found = read_tensors(file, lambda header: None)
    return {path: _split(path, layer, found) for path, layer in layers.items()}


def _split(path: str, layer: LayerState, found: Mapping[str, Tensor]) -> LayerState:
    tensors = dict(layer.tensors)
    for name, whole in layer.tensors.items():
        slot = name.removesuffix(".lora_A")
        A0 = found.get(f"{path}:{slot}.start_A")
        B = found.get(f"{path}:{slot}.lora_B")
        both = layer.tensors.get(f"{slot}.lora_B")
        if slot == name or A0 is None or B is None or both is None:
            continue
        r = len(whole) // 2
        A, B0 = whole[:r].clone(), both[:, both.shape[1] // 2 :].clone()
        if A.shape == A0.shape and B.shape == B0.shape:
            again = without_twin(A, B, A0, B0)
            if torch.equal(again[0], whole) and torch.equal(again[1], both):
                own = {"lora_A": A, "lora_B": B, "start_A": A0, "start_B": B0}
                tensors |= {f"{slot}.{key}": tensor for key, tensor in own.items()}
    return replace(layer, tensors=tensors)
