"""loralib's `lora_state_dict` files: `<path>.lora_A`, `<path>.lora_B`, and biases or heads.

| layer | A | B |
|---|---|---|
| Linear, Embedding | (r, in) | (out, r) |
| MergedLinear, n of m slices adapted | (n r, in) | (n out/m, r) |
| Conv, kernel side k | (r k, in k) | (k out/groups, r k) |

Such a file says neither the scale nor what its layers are. `read` takes the missing settings as
arguments. What only the model can tell is left to `attach`: A of two dimensions for a convolution
is loralib's factorisation, whose scale is `lora_alpha k / (r k)`, k times that of a linear layer.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from deltaw.errors import FormatError, raise_all
from deltaw.formats import Misfits, _loralib_layers, no_misfits
from deltaw.formats._files import PICKLES, names_in, read_tensors, replace_files, shown
from deltaw.state import LayerState, State, plain

NAME = "lora_state_dict.bin"
SUFFIXES = (*PICKLES, ".safetensors")
PEFT_NAMES = ("adapter_model.bin", "adapter_model.safetensors")


def sniff(path: Path | str) -> bool:
    """Tell whether `path` is a pickle, or a safetensors file with loralib's names in it."""
    path = _file(path)
    if path.name in PEFT_NAMES or not os.path.isfile(path):
        return False
    if path.suffix in PICKLES:
        return True
    return any(name.endswith(".lora_A") for name in names_in(path))


def read(
    path: Path | str,
    misfits: Misfits = no_misfits,
    *,
    finite: bool = True,
    lora_alpha: float | None = None,
    r: int | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
) -> State:
    """Read a file of loralib's.

    Args:
        path: the file, or a folder that `write` made.
        misfits: returns what does not fit the model.
        finite: whether NaN and Inf are refused.
        lora_alpha: what the adapter was trained with; it decides the scale, is not in the file and
            has no safe default (loralib's own is 1).
        r: rank; needed only to tell a convolution, by its r k rows of A, before a model is there.
        enable_lora: pattern -> one flag per slice, for the fused layers.

    Raises:
        FormatError: listing what the arguments lack and all that is wrong with the file.
    """
    file = _file(path)
    if not os.path.isfile(file):
        raise FormatError(
            f"There is no file {shown(file)}.\nFix: name a file of loralib's tensors."
        )

    def check(header: Mapping[str, Tensor]) -> None:
        raise_all(
            FormatError,
            f"{shown(file)} cannot be read as loralib's:",
            found.problems(header),
            "call deltaw.formats.loralib.read with the settings the adapter was trained with, "
            "and attach the state it returns.",
        )

    found = _loralib_layers.Reader(lora_alpha, r, enable_lora or {})
    state = found.state(read_tensors(file, check, finite))
    raise_all(FormatError, f"{shown(file)} does not fit the model:", misfits(state))
    return state


def write(state: State, path: Path | str) -> None:
    """Write `path`, or `lora_state_dict.bin` in it if it has no suffix of a tensor file.

    Raises:
        FormatError: listing all that loralib's format cannot hold; nothing is written then.
        DeltawError: if the file cannot be written; what was there is unchanged.
    """
    state = replace(state, layers={p: _halved(layer) for p, layer in state.layers.items()})
    raise_all(
        FormatError,
        "loralib's format cannot hold this adapter:",
        _loralib_layers.unwritable(state),
        "save it in PEFT's format.",
    )
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in sorted(_loralib_layers.named(state).items())
    }
    file = _file(path)
    if file.suffix in PICKLES:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    else:
        content = save(tensors, metadata={"format": "pt"})
    replace_files(file.parent, {file.name: content})


def _halved(layer: LayerState) -> LayerState:
    """Return the layer with twice the rank in place of a start, and a scale for that rank."""
    if not any(".start_" in name for name in layer.tensors):
        return layer
    tensors = plain(layer).tensors
    doubled = {n: t * 2 if n.endswith("lora_B") else t for n, t in tensors.items()}
    return replace(layer, tensors=doubled, scale=layer.scale / 2)


def _file(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix in SUFFIXES else path / NAME
