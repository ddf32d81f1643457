"""`deltaw.json`: what PEFT's own files cannot say about an adapter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from deltaw.errors import FormatError
from deltaw.formats._files import json_bytes, read_json, shown
from deltaw.formats._peft_attention import SLOTS, Ranks
from deltaw.formats._peft_layers import unstack
from deltaw.state import LayerState

NAME = "deltaw.json"


@dataclass(frozen=True)
class Note:
    """The adapted slices of one layer, that it is a Conv1D, its exact scale; ranks of slots.

    `stacks` are the adapted parameters of a module in its own order, with the experts of each.
    """

    enabled: tuple[bool, ...] = ()
    conv1d: bool = False
    scale: float | None = None
    slots: Ranks = field(default_factory=dict)
    stacks: tuple[tuple[str, int], ...] = ()

    def apply(self, layer: LayerState) -> LayerState:
        """Return the layer with this added, as far as its tensors agree."""
        if self.scale is not None and math.isclose(self.scale, layer.scale):
            layer = replace(layer, scale=self.scale)
        if self.conv1d and layer.kind == "linear":
            return replace(layer, kind="conv1d")
        return unstack(layer, self.enabled) if self.enabled else layer


@dataclass(frozen=True)
class Side:
    """The fingerprint of the base, and a note on every layer that needs one."""

    base: str | None = None
    notes: Mapping[str, Note] = field(default_factory=dict)

    def content(self) -> bytes:
        """Return the file's bytes."""
        notes = {
            path: {name: value for name, value in vars(note).items() if value}
            for path, note in self.notes.items()
            if note != Note()
        }
        return json_bytes({"base": self.base, "deltaw": version("deltaw"), "layers": notes})


def read(folder: Path) -> Side:
    """Read the file, or return an empty one where there is none.

    Raises:
        FormatError: if it is not one that deltaw wrote.
    """
    file = folder / NAME
    if not file.is_file():
        return Side()
    content = read_json(file)
    base, layers = content.get("base"), content.get("layers", {})
    if not isinstance(base, str | None) or not isinstance(layers, dict):
        raise _unusable(file, "base and layers")
    return Side(base, {path: _note(file, path, note) for path, note in layers.items()})


def _note(file: Path, path: str, content: object) -> Note:
    values = content if isinstance(content, dict) else {"": content}
    enabled, conv1d = values.get("enabled", []), values.get("conv1d", False)
    scale, slots, stacks = values.get("scale"), values.get("slots", {}), values.get("stacks", [])
    if (
        values.keys() - {"enabled", "conv1d", "scale", "slots", "stacks"}
        or not isinstance(enabled, list)
        or not all(isinstance(flag, bool) for flag in enabled)
        or not isinstance(conv1d, bool)
        or not isinstance(scale, int | float | None)
        or not isinstance(slots, dict)
        or slots.keys() - set(SLOTS)
        or not all(isinstance(rank, int) and rank > 0 for rank in slots.values())
        or not isinstance(stacks, list)
        or not all(map(_is_stack, stacks))
    ):
        raise _unusable(file, repr(path))
    return Note(tuple(enabled), conv1d, scale, slots, tuple((name, n) for name, n in stacks))


def _is_stack(content: object) -> bool:
    match content:
        case [str(), int(count)]:
            return count >= 0
    return False


def _unusable(file: Path, what: str) -> FormatError:
    return FormatError(
        f"{shown(file)}: {what} cannot be used as written.\n"
        "Fix: remove the file; the adapter does the same without it."
    )
