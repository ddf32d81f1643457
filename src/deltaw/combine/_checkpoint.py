"""The tensors of a model's files, read one at a time: safetensors or pickles, in shards or not."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.errors import FormatError, printable, raise_all

PICKLES = (".bin", ".pt", ".pth")


class Checkpoint:
    """The tensors at `path`, a file or a folder; nothing is read before it is asked for.

    Raises:
        FormatError: if there are none, a shard is missing, or a file is damaged or would run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files, promised = _files(path)
        for file in files:
            if file.suffix in PICKLES:
                self._add_pickle(file)
            else:
                self._add(file)
        raise_all(
            FormatError,
            f"{shown(path)} is not whole; these tensors of its index are in none of its files:",
            [printable(name, 300) for name in sorted(promised - self.shapes.keys())],
            "copy or download the checkpoint again.",
        )

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        place = self._place[name]
        if isinstance(place, Tensor):
            return place.detach()
        try:
            tensor: Tensor = place.get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise _damaged(self.path, problem) from problem
        return tensor

    def _add(self, file: Path) -> None:
        try:
            opened: Any = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                self._place[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as problem:
            raise _damaged(file, problem) from problem

    def _add_pickle(self, file: Path) -> None:
        try:
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
        except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as problem:
            raise _damaged(file, problem) from problem
        plain = isinstance(content, Mapping) and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        )
        if not plain:
            raise FormatError(
                f"{shown(file)} holds more than tensors by name.\n"
                "Fix: save the model's state dict alone."
            )
        self._place |= content
        self.shapes |= {name: tuple(value.shape) for name, value in content.items()}


def shown(path: Path) -> str:
    """Return a path so that it is safe to print."""
    return printable(str(path), 4096)


def _files(path: Path) -> tuple[list[Path], set[str]]:
    """Return the files of a checkpoint, and the names that its index promises."""
    if path.is_file():
        return [path], set()
    if not path.is_dir():
        raise FormatError(f"There is no {shown(path)}. Fix: check the path of the checkpoint.")
    if (path / "adapter_config.json").is_file():
        raise FormatError(
            f"{shown(path)} is an adapter, not a whole model.\n"
            "Fix: give the folder of the model with its fine-tuned weights."
        )
    for kind in ("safetensors", "bin"):
        index = sorted(path.glob(f"*.{kind}.index.json"))
        files = sorted(path.glob("*.safetensors" if kind == "safetensors" else "pytorch_model.bin"))
        if len(index) == 1:
            return _sharded(index[0])
        if len(files) == 1:
            return files, set()
        if index or files:
            names = ", ".join(shown(Path(file.name)) for file in (*index, *files))
            raise FormatError(f"{shown(path)} holds several models. Fix: name one of {names}.")
    raise FormatError(
        f"{shown(path)} holds no model: neither *.safetensors nor pytorch_model.bin.\n"
        "Fix: give a folder that save_pretrained wrote, or a file of tensors."
    )


def _sharded(index: Path) -> tuple[list[Path], set[str]]:
    try:
        content = json.loads(index.read_text("utf-8"))
        names = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise FormatError(
            f"{shown(index)} is no index of shards ({type(problem).__name__}).\n"
            "Fix: copy or download it again."
        ) from problem
    files = sorted(set(names.values()))
    raise_all(
        FormatError,
        f"{shown(index)} names files that are not beside it:",
        [
            printable(file, 300)
            for file in files
            if Path(file).name != file or not (index.parent / file).is_file()
        ],
        "copy or download the checkpoint again.",
    )
    return [index.parent / file for file in files], set(names)


def _damaged(file: Path, problem: Exception) -> FormatError:
    return FormatError(
        f"{shown(file)} is not a whole file of tensors: {printable(str(problem), 300)}\n"
        "It is damaged, or it would run code of its own when loaded, which deltaw never does.\n"
        "Fix: copy or download it again, as safetensors if there are any."
    )
