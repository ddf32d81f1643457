"""Folders of PEFT's made by hand, whole or damaged."""

import json
from pathlib import Path

import pytest
import torch
from adapter_states import layer
from safetensors.torch import save_file

from deltaw.config import LoraConfig
from deltaw.errors import FormatError
from deltaw.formats import peft
from deltaw.state import State

P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q"]}
STATE = State(LoraConfig(r=3, lora_alpha=6), {"h.q": layer("linear", scale=2.0)})


def pair(path: str, r: int = 3) -> dict[str, torch.Tensor]:
    return {
        f"{P}{path}.lora_A.weight": torch.randn(r, 5),
        f"{P}{path}.lora_B.weight": torch.randn(7, r),
    }


def folder_of(
    folder: Path, config: dict[str, object] | bytes, tensors: dict[str, torch.Tensor] | bytes
) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    file = folder / "adapter_model.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as error:
        peft.read(folder)
    assert str(folder) in str(error.value)
    return str(error.value)
