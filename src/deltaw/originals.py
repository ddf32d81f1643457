"""Where the weights stay while merged ones take their place."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import ConfigError, MergeError, StateError, raise_all
from deltaw.layer import AdaptedLayer

PLACES = ("memory", "cpu", "file", "none")
Kept = Sequence[tuple[str, AdaptedLayer, str]]


def check_kept(original: str, path: str | Path | None) -> None:
    """Raise where the choice of a place makes no sense."""
    if original not in PLACES:
        raise ConfigError(f"original must be one of {', '.join(PLACES)}, got {original!r}.")
    if (original == "file") != (path is not None):
        raise ConfigError('original="file" takes a path, and only it does.')


def keep(original: str, path: str | Path | None, merged: Kept) -> None:
    """Move the originals of the merged tensors to their place."""
    if original == "file":
        assert path is not None
        _keep_in_file(Path(path), merged)
    for _, layer, name in merged:
        kept = layer.originals[name]
        if original == "none":
            del layer.originals[name]
        elif original == "cpu" and kept.tensor is not None:
            layer.originals[name] = replace(kept, tensor=kept.tensor.cpu())


def restored(merged: Kept) -> Iterator[tuple[AdaptedLayer, str, Tensor]]:
    """Yield each layer's original tensor, on the device of the merged one."""
    found = []
    for path, layer, name in merged:
        kept = layer.originals[name]
        tensor = kept.tensor
        if tensor is None:
            assert kept.file is not None
            tensor = _read(kept.file, f"{path}.{name}", layer.frozen(name))
        found.append((layer, name, tensor.to(layer.frozen(name).device)))
    yield from found


def _keep_in_file(path: Path, merged: Kept) -> None:
    kept = {f"{p}.{name}": layer.originals[name] for p, layer, name in merged}
    tensors = {
        name: k.tensor.clone() if k.parameter is not None else k.tensor.contiguous()
        for name, k in kept.items()
        if k.tensor is not None
    }
    if path.exists():
        problems = [
            f"{name} in {path} is not the weight that is being replaced"
            for name, tensor in tensors.items()
            if not _same(_read(path, name, tensor), tensor)
        ]
        raise_all(MergeError, "The originals cannot be kept there:", problems)
    else:
        _write(path, tensors)
    for _, layer, name in merged:
        layer.originals[name] = replace(layer.originals[name], tensor=None, file=path)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    spare = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, spare)
        os.replace(spare, path)
    except (OSError, SafetensorError) as problem:
        spare.unlink(missing_ok=True)
        raise MergeError(
            f"The originals cannot be written to {path}: {problem}.\n"
            "Fix: give a path in a folder that exists, on a disk with room."
        ) from None


def _read(path: Path, name: str, like: Tensor) -> Tensor:
    """Return the tensor called `name`, or whose name ends in it or that it ends in, from a file."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key == name or name.endswith("." + key) or key.endswith("." + name):
                    tensor: Tensor = opened.get_tensor(key)
                    if tensor.shape == like.shape and tensor.dtype == like.dtype:
                        return tensor
    raise StateError(f"{path} holds no {name} of shape {tuple(like.shape)} and dtype {like.dtype}.")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.contiguous().cpu().view(torch.uint8))
