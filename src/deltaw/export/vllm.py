"""An adapter that vLLM serves beside its base: one rank, and alpha = r in every layer."""

import json
import shlex

from deltaw import combine
from deltaw.errors import FormatError, printable, raise_all
from deltaw.export._limits import merge_instead, problems
from deltaw.export._order import Order, Told
from deltaw.export._tokenizer import TEMPLATE, add_tokenizer
from deltaw.formats import peft
from deltaw.state import LayerState, plain

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank`; the adapter's own rank may be any up to that."""


def write(order: Order) -> Told:
    """Write PEFT's files with every scale in B and zeros up to the highest rank.

    vLLM reads one `r` and one `lora_alpha` and no patterns, so that scales of rsLoRA and of
    `alpha_pattern` would be lost, and `rank_pattern` be misread.

    Raises:
        RunError: if nobody says what the base is.
        FormatError: listing all that vLLM refuses: parameters trained in full, DoRA, biases, rows
            of tokens, embeddings and convolutions, ranks above 512.

    Source: vLLM, its LoRA loader.
    """
    source = order.source
    base = source.require_base()
    found = problems(source)
    found += [
        f"{printable(path, 300)}: its rank is {rank}, above {RANKS[-1]}"
        for path, layer in source.state.layers.items()
        if (rank := _rank(layer)) > RANKS[-1]
    ]
    raise_all(FormatError, "vLLM cannot serve this adapter:", found, merge_instead(source))
    state = combine.portable(source.state)
    r = state.config.r
    peft.write(state, order.folder)
    told = {"written": f"an adapter of r={r}, with alpha = r in {len(state.layers)} layers"}
    told |= add_tokenizer(source, order.folder)
    return told | {"next": _command(order, base, next(R for R in RANKS if r <= R))}


def _rank(layer: LayerState) -> int:
    """Return the rank of a layer as one matrix, slices and a start that is subtracted included."""
    return sum(len(t) for name, t in plain(layer).tensors.items() if name.endswith(".lora_A"))


def _command(order: Order, base: str, rank: int) -> str:
    """Return the line that serves the adapter, quoted for a shell."""
    name, path = order.out.name, str(order.out)
    module = f"{name}={path}"
    if "," in module or module.count("=") > 1:
        module = json.dumps({"name": name, "path": path})
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
    if order.source.revision is not None:
        words += ["--revision", order.source.revision]
    if (order.folder / TEMPLATE).is_file():
        words += ["--chat-template", str(order.out / TEMPLATE)]
    return shlex.join([*words, "--lora-modules", module])
