"""Bytes kept for the backward pass of the 88M Llama, counted exactly."""

import json
import sys

from benchmarks import memory, rounds, shapes
from benchmarks.contestants import CONTESTANTS
from benchmarks.results import Results
from benchmarks.tables import digits, table

TITLE = "Bytes saved for the backward pass"
QUICK = True
ROWS, TOKENS = 4, 256
PARTS = {
    "blocks": (
        "floor",
        "deltaw",
        "deltaw-blocks",
        "deltaw-remake",
        "peft",
        "peft-bf16",
        "loralib",
        "deltaw-dropout",
        "peft-dropout",
    ),
    "whole": ("floor", "floor-loss", "deltaw", "deltaw-loss", "deltaw-lean", "peft", "peft-bf16"),
}
TITLES = {"blocks": "The blocks alone", "whole": "With the output head and the loss"}


def run(results: Results) -> None:
    """Count once for every contestant; a second count would give the same."""
    names = [f"{part}/{name}" for part, names in PARTS.items() for name in names]
    rounds.measure(results, names, rounds=1)


def measure(which: str) -> dict[str, float]:
    """Count for one contestant, without the head and the loss or with them."""
    part, name = which.split("/")
    return {"bytes": count(part, name, "llama-88m")}


def count(part: str, name: str, shape: str) -> int:
    """Return the bytes that one forward pass keeps."""
    import torch

    model = shapes.build(shape)
    whole = CONTESTANTS[name].prepare(model).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=generator)
    if part == "blocks":
        return memory.saved_bytes(model, lambda: model.model(input_ids=ids))
    return memory.saved_bytes(model, lambda: whole(input_ids=ids, labels=ids).loss)


def report(results: Results) -> str:
    """Return one table for the blocks and one for the whole model."""
    text = [
        f"The 88M Llama in bfloat16, one forward pass of {ROWS} x {TOKENS} tokens, adapters on all "
        "linear layers but the head, r=16. Every storage that autograd keeps counts once and "
        "whole; parameters and buffers do not count. The floor is the frozen model without "
        "adapters."
    ]
    for part, names in PARTS.items():
        found = {name: rounds.values(results, f"{part}/{name}", "bytes").get(0) for name in names}
        known = {name: count for name, count in found.items() if count is not None}
        if {"floor", "deltaw"} <= known.keys():
            rows = [
                (
                    CONTESTANTS[name].title,
                    digits(count / 1e6),
                    digits(count / known["floor"]),
                    digits(count / known["deltaw"]),
                )
                for name, count in known.items()
            ]
            text += [
                f"### {TITLES[part]}",
                table(("", "MB", "bytes / floor's", "bytes / deltaw's"), rows),
            ]
    return "\n\n".join(text)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
