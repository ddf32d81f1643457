"""Shapes and dtypes of a model's weights, from the headers of its safetensors files alone.

Source: the safetensors format; of a hub's files only the headers are asked for, by range.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from deltaw.errors import ConfigError, FormatError, RunError, printable, raise_all

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Header:
    """What the files say of one weight: its dtype by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Weights:
    """All weights of a checkpoint by name."""

    headers: dict[str, Header]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most numbers are in."""
        counts = {
            dtype: sum(h.numel for h in self.headers.values() if h.dtype == name)
            for name, dtype in DTYPES.items()
        }
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return sum(h.numel * _width(h.dtype) for h in self.headers.values())


def read_headers(name: str, revision: str | None = None) -> Weights:
    """Return the weights of a folder, or of a name on the hub, without reading any of them.

    A model of the hub that was downloaded before is looked up in the cache.

    Raises:
        FormatError: listing every file that is missing or damaged.
        RunError: if the folder has no safetensors files, or the hub cannot be asked.
        ConfigError: for a hub's name without huggingface_hub.
    """
    headers = _local(Path(name)) if Path(name).is_dir() else _hub(name, revision)
    strange = sorted({h.dtype for h in headers.values()} - {*DTYPES} - {*OTHERS})
    raise_all(
        FormatError,
        f"The weights of {printable(name, 200)} are in dtypes whose size is not known:",
        [printable(dtype) for dtype in strange],
        "give a model whose weights are not packed; method='qlora' packs them.",
    )
    return Weights(headers)


def _width(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else OTHERS[dtype]


def _local(folder: Path) -> dict[str, Header]:
    found: dict[str, Header] = {}
    problems = []
    for file in _files(folder):
        try:
            found |= dict(_read(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            problems.append(f"{printable(file.name)}: {printable(str(error), 200)}")
    shown = printable(str(folder), 200)
    raise_all(
        FormatError,
        f"The weights in {shown} cannot be read:",
        problems,
        "copy these files again from where the model came from, unless they cannot be mapped here.",
    )
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not index.is_file():
        raise RunError(
            f"{printable(str(folder), 200)} has neither {WHOLE} nor {INDEX}.\n"
            "Fix: give a folder written by save_pretrained of transformers."
        )
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [folder / Path(str(name)).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{printable(str(index), 200)} is no index of weights: {printable(str(error), 200)}\n"
            "Fix: copy it again from where the model came from."
        ) from error


def _read(file: Path) -> Iterator[tuple[str, Header]]:
    with safe_open(file, "pt") as held:
        for key in held.keys():  # noqa: SIM118  (it is no mapping)
            part = held.get_slice(key)
            yield key, Header(part.get_dtype(), tuple(part.get_shape()))


def _hub(name: str, revision: str | None) -> dict[str, Header]:
    try:
        import huggingface_hub
        from huggingface_hub import errors as hub
    except ImportError as error:
        raise ConfigError(
            f"{printable(name, 200)} is no folder, and the hub needs huggingface_hub, which cannot "
            f"be imported: {error}\nFix: pip install 'deltaw[train]', or give a folder."
        ) from error
    known_errors = (hub.NotASafetensorsRepoError, hub.SafetensorsParsingError, hub.HTTPError)
    try:
        for file in (WHOLE, INDEX):
            known = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            folder = Path(known).parent if isinstance(known, str) else None
            if folder is not None and all(part.is_file() for part in _files(folder)):
                return _local(folder)
        found = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except (OSError, ValueError, *known_errors) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"The headers of {printable(name, 200)} cannot be read: {printable(first, 300)}\n"
            "Fix: give a folder, or the hub's name of a model with safetensors files, online."
        ) from error
    return {
        key: Header(tensor.dtype, tuple(tensor.shape))
        for file in found.files_metadata.values()
        for key, tensor in file.tensors.items()
    }
