"""Reading and writing the files of an adapter: tensors, JSON, and several files at once."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.errors import DeltawError, FormatError, printable, raise_all
from deltaw.kernels.merge import is_finite

PICKLES = (".bin", ".pt", ".pth")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What the restricted unpickler raises on damaged input, found by feeding it damaged files.
_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Check = Callable[[Mapping[str, Tensor]], None]


def shown(path: Path) -> str:
    """Return a path so that it is safe to print."""
    return printable(str(path), 4096)


def require_readable(path: Path) -> None:
    """Raise `FormatError` if what lies at `path` may not be read."""
    if os.path.exists(path) and not os.access(path, os.R_OK):
        raise FormatError(
            f"{shown(path)} cannot be read: permission denied.\nFix: check its permissions."
        )


def names_in(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; none for what is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def of_mlx(path: Path) -> FormatError:
    """Return the error for an adapter of another format that is met often."""
    return FormatError(
        f"{shown(path)} is of MLX's adapter format (mlx-lm), which is not read.\n"
        "Fix: convert the adapter to PEFT's format."
    )


def read_tensors(path: Path, check: Check, finite: bool = True) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file or of a pickle (`weights_only=True`).

    `check` sees names, shapes and dtypes first; for a safetensors file these are tensors on the
    meta device made from its header, so that nothing large was allocated if `check` raises.

    Raises:
        FormatError: if the file may not be read, is damaged, would run code when loaded, or, where
            `finite`, holds NaN or Inf.
    """
    require_readable(path)
    tensors = _unpickled(path, check) if path.suffix in PICKLES else _mapped(path, check)
    raise_all(
        FormatError,
        f"{shown(path)} holds numbers that are not finite:",
        not_finite(tensors) if finite else [],
        "the training run that made it diverged; take an earlier checkpoint.",
    )
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors with NaN or Inf in them, or with no values at all."""
    return [
        f"{name!r} holds no values: it is on the meta device"
        if tensor.is_meta
        else f"{name!r} has {int((~torch.isfinite(tensor)).sum())} NaN or Inf of {tensor.numel()}"
        for name, tensor in tensors.items()
        if tensor.is_meta or not is_finite(tensor)
    ]


def _mapped(path: Path, check: Check) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: _meta(path, name, file.get_slice(name)) for name in sorted(file.keys())}
            check(header)
            # A copy, because the mapping would follow whoever overwrites the file later.
            return {name: file.get_tensor(name).clone() for name in header}
    except (SafetensorError, OSError) as problem:
        raise FormatError(
            f"{shown(path)} is not a whole safetensors file: {printable(str(problem), 300)}\n"
            "Fix: copy or download it again; its size or header is not what was written."
        ) from problem


def _meta(path: Path, name: str, entry: Any) -> Tensor:
    dtype = _DTYPES.get(entry.get_dtype())
    if dtype is None:
        raise FormatError(
            f"{shown(path)}: {name!r} is stored as {entry.get_dtype()}, which is not read.\n"
            f"Fix: convert it to one of {', '.join(_DTYPES)}."
        )
    try:
        return torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    except (TypeError, RuntimeError) as problem:
        raise FormatError(
            f"{shown(path)}: {name!r} has a shape that no tensor can have: "
            f"{printable(str(entry.get_shape()), 300)}.\n"
            "Fix: copy or download it again, or have its author save a plain state dict."
        ) from problem


def _unpickled(path: Path, check: Check) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise FormatError(f"{shown(path)} cannot be read: {problem.strerror}.") from problem
    except _DAMAGE as problem:
        raise FormatError(
            f"{shown(path)} is not a plain file of tensors ({type(problem).__name__}).\n"
            "It is damaged, or it would run code of its own when loaded, which deltaw never does.\n"
            "Fix: get the adapter as safetensors, or have its author save a plain state dict."
        ) from problem
    if not isinstance(content, Mapping):
        raise FormatError(f"{shown(path)} holds a {type(content).__name__}, not tensors by name.")
    raise_all(
        FormatError,
        f"{shown(path)} holds more than plain tensors by name:",
        [f"{name!r} {text}" for name, value in content.items() if (text := _unread(name, value))],
        "save the adapter's state dict alone, as plain dense tensors on the CPU.",
    )
    tensors: dict[str, Tensor] = {name: content[name].detach() for name in sorted(content)}
    check(tensors)
    return tensors


def _unread(name: object, value: object) -> str:
    """Return why an entry of a pickle is not read, or an empty string."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.is_nested or value.layout is not torch.strided:
        return "is nested" if value.is_nested else f"is {value.layout}"
    if value.is_meta:
        return "is on the meta device and has no numbers"
    if value.dtype not in _DTYPES.values():
        return f"holds {value.dtype}"
    if value.nbytes > value.untyped_storage().nbytes():
        return f"of {tuple(value.shape)} repeats what is stored instead of storing it whole"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, in UTF-8 with or without a byte order mark.

    Raises:
        FormatError: naming the file and line.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as problem:
        raise FormatError(
            f"{shown(path)}:{problem.lineno}: not JSON: {problem.msg} at column {problem.colno}."
        ) from problem
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise FormatError(
            f"{shown(path)}:{line}: not UTF-8: byte {problem.object[problem.start]:#04x}.\n"
            "Fix: save the file as UTF-8."
        ) from problem
    except (RecursionError, ValueError) as problem:
        raise FormatError(
            f"{shown(path)}: not a JSON file of settings: {printable(str(problem), 300)}."
        ) from problem
    except OSError as problem:
        raise FormatError(f"{shown(path)} cannot be read: {problem.strerror}.") from problem
    if not isinstance(content, dict):
        raise FormatError(
            f"{shown(path)}:1: expected a JSON object, found {type(content).__name__}."
        )
    return content


def json_bytes(content: Mapping[str, object]) -> bytes:
    """Return `content` as JSON, the same bytes for the same content."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    return (text + "\n").encode()


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into `folder`, each whole or not at all.

    All are written under temporary names first and renamed when every one is on the disk.

    Raises:
        DeltawError: if they cannot be written; it says which are new if a rename failed midway,
            otherwise what was there before is unchanged.
    """
    missing = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    parts = {folder / f".{name}.part": folder / name for name in contents}
    written: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, content in zip(parts, contents.values(), strict=True):
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for part, target in parts.items():
            part.replace(target)
            written.append(target.name)
    except (OSError, ValueError) as problem:
        _remove(parts, missing)
        why = getattr(problem, "strerror", None) or problem
        state = f"Of it {', '.join(written)} is new" if written else "What was there is intact"
        raise DeltawError(
            f"{shown(folder)} cannot be written: {why}. {state}.\n"
            "Fix: free space there, or choose another folder."
        ) from problem
    except BaseException:
        _remove(parts, missing)
        raise


def _remove(parts: Mapping[Path, Path], folders: Sequence[Path]) -> None:
    with suppress(OSError, ValueError):
        for part in parts:
            part.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
