"""An adapter as a GGUF file, which llama.cpp puts on a GGUF model while it loads."""

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw import combine
from deltaw.errors import ConfigError, FormatError, printable, raise_all
from deltaw.export._limits import LINEAR, merge_instead, problems
from deltaw.export._model import load_config
from deltaw.export._order import Order, Told
from deltaw.export._source import Source
from deltaw.export._tokenizer import other_template

ARCHITECTURES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""llama.cpp's architecture of every `model_type` of transformers that is written."""

FILE = "adapter.gguf"


def write(order: Order) -> Told:
    """Write `adapter.gguf`, in float32.

    Raises:
        ConfigError: if the package gguf is not installed.
        RunError: if the base's configuration cannot be loaded.
        FormatError: listing all that the file cannot hold, and layers that llama.cpp has no tensor
            for; or if the base's architecture is not known.

    Source: llama.cpp, its GGUF files of LoRA adapters.
    """
    layers, r = write_file(order, order.folder / FILE)
    told = {"written": f"{FILE}: {layers} layers, rank {r}, float32"}
    file = str(order.out / FILE)
    told |= other_template(order.source)
    return told | {"next": f"llama-cli -m BASE.gguf --lora {shlex.quote(file)}"}


def write_file(order: Order, file: Path) -> tuple[int, int]:
    """Write the adapter to a GGUF file; return how many layers it has, and their rank."""
    gguf, source = _package(), order.source
    config = load_config(source)
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise FormatError(
            f"A base of type {printable(config.model_type)} is not written as GGUF; "
            f"{', '.join(ARCHITECTURES)} are.\nFix: {merge_instead(source)}, and convert that "
            "with llama.cpp's convert_hf_to_gguf.py."
        )
    names = gguf.get_tensor_name_map(_arch(gguf, name), config.num_hidden_layers)
    places = _places(source, names, tied=config.tie_word_embeddings)
    state = combine.portable(source.state)
    writer = gguf.GGUFWriter(file, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(state.config.r))
    for path, layer in state.layers.items():
        A, B = layer.tensors["weight.lora_A"], layer.tensors["weight.lora_B"]
        heads = _heads(path, name, config)
        if heads:
            B = B[interleaved(len(B), heads)]
        for suffix, factor in (("lora_a", A), ("lora_b", B)):
            values = factor.to(torch.float32).contiguous().numpy()
            writer.add_tensor(f"{places[path]}.weight.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(state.layers), state.config.r


def _places(source: Source, names: Any, *, tied: bool) -> dict[str, str]:
    """Return llama.cpp's name of every adapted layer; raise if the file cannot hold them all."""
    found = problems(source, (*LINEAR, "conv1d"))
    places = {}
    for path, layer in source.state.layers.items():
        place = names.get_name(path)
        if layer.kind == "module":
            continue
        if place is None:
            found.append(f"{printable(path, 300)}: llama.cpp has no tensor of this name")
        elif place == "output" and tied:
            found.append(f"{printable(path, 300)}: it is tied to the embedding in the base")
        places[path] = place
    raise_all(FormatError, "A GGUF file cannot hold this adapter:", found, merge_instead(source))
    return places


def interleaved(rows: int, heads: int) -> Tensor:
    """Return the order in which llama.cpp keeps the rows of q and k of a Llama.

    A rotary embedding turns pairs of rows of a head of width d. transformers pairs i with
    i + d / 2; llama.cpp pairs neighbours. So its rows 2 i and 2 i + 1 of a head are the rows i and
    i + d / 2 of transformers' head. ΔW = B A has W's rows in B, so B alone is reordered.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _heads(path: str, architecture: str, config: Any) -> int:
    """Return the number of heads in the rows of a layer whose rows are reordered, else 0."""
    if architecture != "llama" or not path.endswith((".q_proj", ".k_proj")):
        return 0
    return int(
        config.num_attention_heads if path.endswith(".q_proj") else config.num_key_value_heads
    )


def _arch(gguf: Any, name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "Writing GGUF needs the package gguf. Fix: pip install 'deltaw[gguf]'"
        ) from error
    return gguf
