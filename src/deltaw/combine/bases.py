"""The base's weights, which the ΔW of DoRA depends on.

    ΔW = g ∘ (W + s B A) - W = (g - 1) ∘ W + g ∘ s B A    with    g = m / ‖W + s B A‖,

so that a sum of such ΔW has a gain for every row of W beside its factors, and is a DoRA again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from deltaw.combine._checkpoint import Checkpoint, shown
from deltaw.combine._deltas import EXPERTS, matrix_shape, number_of, pair, slots
from deltaw.combine._places import ATTENTION, TRANSPOSED, WEIGHT, Place, Slot, attention_slots
from deltaw.errors import MergeError, printable
from deltaw.marks import mark
from deltaw.state import LayerState, State

TURNED = "conv_transpose"
INPUTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
PARTS = (*INPUTS, "bias_k", "bias_v", "out_proj.weight")
"""The matrices of `nn.MultiheadAttention` that a fingerprint is of, in its order."""


class Base(Protocol):
    """Where the weights of the base are to be had."""

    def lacking(self, state: State) -> list[str]:
        """Return the weights of adapted layers that are not to be had."""

    def is_other_than(self, state: State) -> bool:
        """Tell whether an adapter is known to be of a base with other weights."""

    def matrix(self, path: str, layer: LayerState, slot: str) -> Tensor:
        """Return the (out, in) that B A of a slot is added to."""


def is_dora(state: State) -> bool:
    """Tell whether the ΔW of an adapter depends on the base's weights."""
    return state.config.method == "dora"


class StoredBase:
    """The base in a folder or file of safetensors, of which one weight is read at a time.

    Raises:
        FormatError: if it is damaged, or holds no model.
    """

    def __init__(self, path: str | Path) -> None:
        self._checkpoint = Checkpoint(Path(path))

    def lacking(self, state: State) -> list[str]:
        """Return the names of the weights of adapted layers that are not here."""
        wanted = [
            key
            for path, layer in state.layers.items()
            if layer.kind != EXPERTS
            for slot in slots(layer)
            for key in self._slot(path, layer, slot).keys
        ]
        return sorted(name for name in set(wanted) if self._name(name) is None)

    def is_other_than(self, state: State) -> bool:
        """Compare the adapter's fingerprint with that of the same weights here."""
        if state.base is None:
            return False
        weights: dict[str, Tensor] = {}
        for path, layer in sorted(state.layers.items()):
            if layer.kind == ATTENTION:
                parts = [f"{path}.{name}" for name in PARTS]
                weights |= {part: self._read(part) for part in parts if self._name(part)}
            elif layer.kind != "module":
                weights[path] = self._read(f"{path}.{WEIGHT}")
        ours = mark(weights)
        same_dtype = ours is not None and ours.split(":")[0] == state.base.split(":")[0]
        return same_dtype and ours != state.base

    def matrix(self, path: str, layer: LayerState, slot: str) -> Tensor:
        """Return the weight of a slot as the matrix (out, in).

        Raises:
            MergeError: if the base's weight has another shape.
        """
        own = self._slot(path, layer, slot)
        weight = self._read(own.keys[0])
        adapted = slots(layer)
        rows, columns = matrix_shape(layer, slot if slot in adapted else adapted[0])
        out = rows * own.blocks
        turned = layer.kind in TRANSPOSED or weight.shape != (out, columns)
        kind = "conv1d" if weight.dim() == 2 and turned else layer.kind
        groups = len(weight) // pair(layer, slot)[0].shape[1] if kind == TURNED else 1
        [whole] = Place(kind, {}, groups).matrices(weight)
        if tuple(whole.shape) != (out, columns):
            raise MergeError(
                f"{printable(own.keys[0], 300)} is {tuple(weight.shape)} in "
                f"{shown(self._checkpoint.path)}, and the adapter is for {out} x {columns}.\n"
                "Fix: give the adapter's own base."
            )
        return own.of(whole)

    def _slot(self, path: str, layer: LayerState, slot: str) -> Slot:
        """Return where a slot lies."""
        if layer.kind == ATTENTION:
            packed = self._name(f"{path}.q_proj_weight") is None
            return attention_slots(path, packed)[slot]
        whole = Slot((f"{path}.{WEIGHT}",))
        if not layer.enabled:
            return whole
        return replace(whole, block=number_of(slot), blocks=len(layer.enabled))

    def _name(self, wanted: str) -> str | None:
        """Return what a weight is called here, where one model may lie inside the other."""
        names = [
            name
            for name in self._checkpoint.shapes
            if f".{name}".endswith(f".{wanted}") or f".{wanted}".endswith(f".{name}")
        ]
        return wanted if wanted in names else names[0] if len(names) == 1 else None

    def _read(self, wanted: str) -> Tensor:
        name = self._name(wanted)
        assert name is not None, "lacking() told of it"
        return self._checkpoint.read(name)
