"""Where the weights stay while merged ones take their place."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import ConfigError, MergeError, StateError, raise_all
from deltaw.fingerprint import bits
from deltaw.layer import AdaptedLayer, Original

PLACES = ("keep", "cpu", "file", "none")
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
    for _, layer, name in merged:
        kept = layer.originals[name]
        tensor = kept.tensor
        if tensor is None:
            tensor = _read(kept)
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
        keys = {name: _key(path, name, tensor) for name, tensor in tensors.items()}
        problems = [
            f"{name} in {path} is not the weight that is being replaced"
            for name, key in keys.items()
            if key is None
        ]
        raise_all(MergeError, "The originals cannot be kept there:", problems)
    else:
        _write(path, tensors)
        keys = {name: name for name in tensors}
    for p, layer, name in merged:
        full = f"{p}.{name}"
        layer.originals[name] = replace(
            kept[full], tensor=None, file=path, key=keys[full], bits=bits(tensors[full])
        )


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


def _read(kept: Original) -> Tensor:
    """Return the original from its file; raise where that no longer holds the same bits."""
    assert kept.file is not None
    for key, tensor in _stored(kept.file):
        if key == kept.key and bits(tensor()) == kept.bits:
            return tensor()
    raise StateError(f"{kept.file} no longer holds the original of {kept.key}.")


def _key(path: Path, name: str, own: Tensor) -> str | None:
    """Return the name under which a file holds the tensor: its own, or one that ends alike."""
    alike = [
        (key, tensor)
        for key, tensor in _stored(path)
        if key == name or name.endswith("." + key) or key.endswith("." + name)
    ]
    alike.sort(key=lambda pair: pair[0] != name)
    same = bits(own)
    return next((key for key, tensor in alike if bits(tensor()) == same), None)


def _stored(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the names in a safetensors file or folder, each with what reads its tensor."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield key, functools.partial(_tensor, file, key)


def _tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor
