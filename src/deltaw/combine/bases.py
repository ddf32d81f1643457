"""The base's weights, which the ΔW of DoRA depends on.

    ΔW = g ∘ (W + s B A) - W = (g - 1) ∘ W + g ∘ s B A    with    g = m / ‖W + s B A‖,

so that a sum of such ΔW has a gain for every row of W beside its factors, and is a DoRA again.
"""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from deltaw.combine._checkpoint import Checkpoint, shown
from deltaw.combine._deltas import matrix_shape, number_of, pair, slots
from deltaw.combine._places import TRANSPOSED, Place
from deltaw.errors import MergeError, printable
from deltaw.marks import mark
from deltaw.state import LayerState, State

TURNED = "conv_transpose"


class Base(Protocol):
    """Where the weights of the base are to be had."""

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

    def is_other_than(self, state: State) -> bool:
        """Compare the adapter's fingerprint with that of the same weights here."""
        if state.base is None:
            return False
        adapted = sorted(path for path, own in state.layers.items() if own.kind != "module")
        ours = mark({path: self._weight(path) for path in adapted})
        same_dtype = ours is not None and ours.split(":")[0] == state.base.split(":")[0]
        return same_dtype and ours != state.base

    def matrix(self, path: str, layer: LayerState, slot: str) -> Tensor:
        """Return the weight as the matrix (out, in), or the rows of a fused slice.

        Raises:
            MergeError: if the base has no such weight, or one of another shape.
        """
        weight = self._weight(path)
        rows, columns = matrix_shape(layer, slots(layer)[0])
        out = rows * max(1, len(layer.enabled))
        turned = layer.kind in TRANSPOSED or weight.shape != (out, columns)
        kind = "conv1d" if weight.dim() == 2 and turned else layer.kind
        groups = len(weight) // pair(layer, slot)[0].shape[1] if kind == TURNED else 1
        [whole] = Place(kind, {}, groups).matrices(weight)
        if tuple(whole.shape) != (out, columns):
            raise MergeError(
                f"{printable(path, 300)} is {tuple(weight.shape)} in {shown(self._checkpoint.path)}"
                f", and the adapter is for {out} x {columns}.\nFix: give the adapter's own base."
            )
        return whole.chunk(len(layer.enabled))[number_of(slot)] if layer.enabled else whole

    def _weight(self, path: str) -> Tensor:
        wanted = f"{path}.weight"
        names = [
            name
            for name in self._checkpoint.shapes
            if f".{name}".endswith(f".{wanted}") or f".{wanted}".endswith(f".{name}")
        ]
        name = wanted if wanted in names else names[0] if len(names) == 1 else None
        if name is None:
            raise MergeError(
                f"{shown(self._checkpoint.path)} has no {printable(wanted, 300)}.\n"
                "Fix: give the adapter's own base; layers without a weight of their own cannot be "
                "combined under DoRA (merge them and use deltaw extract)."
            )
        return self._checkpoint.read(name)
