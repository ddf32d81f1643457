"""An adapter as mlx-lm reads it: A and B transposed, one rank and one scale."""

import re
import shlex
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltaw import combine
from deltaw.errors import FormatError, printable, raise_all
from deltaw.export._limits import merge_instead, problems
from deltaw.export._model import load_config
from deltaw.export._order import Order, Told
from deltaw.export._tokenizer import add_tokenizer, other_template
from deltaw.formats._files import json_bytes

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
HEAD = "lm_head"


def write(order: Order) -> Told:
    """Write `adapters.safetensors` and `adapter_config.json`.

    Of a layer y = x Wᵀ + scale (x a) b, with a = Aᵀ (in, r) and b = Bᵀ (r, out). Scales and ranks
    that differ go into B, with zeros up to the highest rank; scale is alpha / r = 1 then.

    mlx-lm adapts the last `num_layers` blocks: in each of them every layer named in `keys`. One
    that the file has no tensors for starts, and stays, at b = 0.

    Raises:
        RunError: if the base's configuration cannot be loaded.
        FormatError: listing all that mlx-lm cannot hold, and layers that it has no module for.

    Source: mlx-lm, its tuner.
    """
    source = order.source
    config = load_config(source).get_text_config()
    found = problems(source)
    found += [
        f"{printable(path, 300)}: mlx-lm has no module of this name"
        for path, layer in source.state.layers.items()
        if layer.kind != "module"
        and not LAYER.fullmatch(path)
        and (path != HEAD or config.tie_word_embeddings)
    ]
    raise_all(FormatError, "mlx-lm cannot hold this adapter:", found, merge_instead(source))
    state = combine.portable(source.state)
    tensors: dict[str, Tensor] = {}
    for path, layer in state.layers.items():
        tensors[f"{path}.lora_a"] = layer.tensors["weight.lora_A"].T.contiguous()
        tensors[f"{path}.lora_b"] = layer.tensors["weight.lora_B"].T.contiguous()
    save_file(tensors, order.folder / "adapters.safetensors", metadata={"format": "mlx"})
    dropout = source.state.config.lora_dropout
    settings = _settings(list(state.layers), config.num_hidden_layers, state.config.r, dropout)
    (order.folder / "adapter_config.json").write_bytes(json_bytes(settings))
    told = {"written": f"{len(state.layers)} layers, rank {state.config.r}, scale 1"}
    told |= add_tokenizer(source, order.folder) | other_template(source)
    command = ["mlx_lm.generate", "--model", source.require_base(), "--adapter-path"]
    return told | {"next": f"{shlex.join([*command, str(order.out)])} --prompt ..."}


def _settings(paths: list[str], blocks: int, r: int, dropout: float) -> dict[str, Any]:
    """Return the content of `adapter_config.json` for adapters at these paths."""
    places = [match for path in paths if (match := LAYER.fullmatch(path))]
    first = min((int(place[1]) for place in places), default=blocks - 1)
    keys = {place[2] for place in places} | ({HEAD} & set(paths))
    return {
        "fine_tune_type": "lora",
        "num_layers": blocks - first,
        "lora_parameters": {"rank": r, "scale": 1.0, "dropout": dropout, "keys": sorted(keys)},
    }
