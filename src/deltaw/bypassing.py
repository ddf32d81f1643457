"""Layers whose weights the module around them reads past their forward."""

from collections.abc import Mapping

from torch import nn

from deltaw.swap import origin_of

_MAMBA = frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"})
_MAMBA2 = frozenset({"conv1d", "out_proj"})
READ: Mapping[str, frozenset[str]] = {
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": frozenset({"conv1d", "dt_proj"}),
    "ZambaMambaMixer": frozenset({"conv1d"}),
    "Mamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
}
"""By the class of a module of transformers, the children whose weights it reads by itself: in
every forward pass, or where it has kernels of a GPU, which take weights and no layers."""


def reader_of(layers: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the class of the module that reads the weight at `path` by itself, if one does."""
    parent, _, name = path.rpartition(".")
    reader = origin_of(layers[parent]).__name__ if parent in layers else ""
    return reader if name in READ.get(reader, ()) else None
