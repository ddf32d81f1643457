"""Where the weights stay while merged ones take their place."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import ConfigError, MergeError, raise_all
from deltaw.fingerprint import bits
from deltaw.layer import AdaptedLayer
from deltaw.storage import Original

PLACES = ("keep", "cpu", "file", "none")
Kept = Sequence[tuple[str, AdaptedLayer, str]]


def check_kept(original: str, path: str | Path | None) -> None:
    """Raise where the choice of a place makes no sense."""
    if original not in PLACES:
        raise ConfigError(f"original must be one of {', '.join(PLACES)}, got {original!r}.")
    if (original == "file") != (path is not None):
        raise ConfigError('original="file" takes a path, and only it does.')
    try:
        Path(path or "").resolve().exists()
    except (OSError, ValueError) as problem:
        raise ConfigError(f"path cannot be that of a file: {problem}.") from None


def away(original: str, kept: Original) -> Original:
    """Return an original on the CPU where its place is there or in a file."""
    if original not in ("cpu", "file") or kept.tensor is None:
        return kept
    return replace(kept, tensor=kept.tensor.cpu())


def keep(original: str, path: str | Path | None, merged: Kept) -> None:
    """Write the originals of the merged tensors to a file, or let them go, if asked to."""
    if original == "file":
        assert path is not None
        _keep_in_file(Path(path).resolve(), merged)
    if original == "none":
        for _, layer, name in merged:
            del layer.originals[name]


def kept_by(layers: Mapping[str, AdaptedLayer]) -> Kept:
    """Return path, layer and name of every merged tensor whose original is kept."""
    return [(path, layer, name) for path, layer in layers.items() for name in layer.originals]


def restored(merged: Kept) -> tuple[list[tuple[AdaptedLayer, str, Tensor]], list[str]]:
    """Return each layer's original tensor on the device of the merged one, and all that forbids it.

    Nothing may take the place of a tensor that was changed since the merge, nor of one whose
    original is no longer in its file.
    """
    found = []
    problems = []
    for path, layer, name in merged:
        kept = layer.originals[name]
        own = layer.frozen(name)
        if bits(own) != kept.merged_bits:
            problems.append(
                f"{path}.{name} was changed since the merge; its new values would be lost"
            )
            continue
        try:
            tensor = _read(kept) if kept.tensor is None else kept.tensor
        except MergeError as problem:
            problems.append(str(problem))
        else:
            found.append((layer, name, tensor.to(own.device)))
    return found, list(dict.fromkeys(problems))


def _keep_in_file(path: Path, merged: Kept) -> None:
    kept = {f"{p}.{name}": layer.originals[name] for p, layer, name in merged}
    tensors = {
        name: k.tensor.clone() if k.parameter is not None else k.tensor.contiguous()
        for name, k in kept.items()
        if k.tensor is not None
    }
    if path.exists():
        keys, problems = _found(path, tensors)
        raise_all(
            MergeError,
            "The originals cannot be kept there:",
            problems,
            "name the file of this very base, or one that does not exist yet.",
        )
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
    raise MergeError(f"{kept.file} no longer holds the original of {kept.key}; put it back there")


def _found(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, str | None], list[str]]:
    """Return the names under which a file holds the tensors, and why it is no place for them."""
    try:
        keys = {name: _key(path, name, tensor) for name, tensor in tensors.items()}
    except MergeError as problem:
        return {}, [str(problem)]
    missing = [name for name, key in keys.items() if key is None]
    return keys, [f"{name} in {path} is not the weight that is being replaced" for name in missing]


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
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield key, functools.partial(_tensor, file, key)


def _tensor(file: Path, key: str) -> Tensor:
    with _opened(file) as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, or raise `MergeError` with the reason why it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as problem:
        raise MergeError(f"{file} holds no originals that can be read: {problem}") from None
