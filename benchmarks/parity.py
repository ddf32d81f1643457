"""The loss of deltaw and of PEFT, step by step from the same initial A and B.

Tokens are drawn anew in every step, the k-th with a probability that falls like 1 / k, so that
there is something to learn.
"""

import json
import sys
import tempfile
from typing import Any

from benchmarks import plots, rounds, shapes
from benchmarks.contestants import by_peft
from benchmarks.results import Results
from benchmarks.tables import digits, table
from benchmarks.training import updater

TITLE = "The same loss as PEFT"
QUICK = False
DTYPES = ("float32", "bfloat16")
STEPS = 100
ROWS, TOKENS = 4, 64
RATE = 1e-4


def run(results: Results) -> None:
    """Train both once in either dtype; a second time would give the same."""
    rounds.measure(results, DTYPES, rounds=1)


def measure(dtype: str, shape: str = "llama-88m", steps: int = STEPS) -> dict[str, list[float]]:
    """Train PEFT's model, and deltaw's from the adapter that PEFT saved before."""
    import torch

    import deltaw

    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tuned = by_peft(shapes.build(shape, dtype))
        tuned.save_pretrained(folder)
        theirs = losses(tuned, steps)
        model = shapes.build(shape, dtype)
        deltaw.load(model, folder, trainable=True)
        return {"peft": theirs, "deltaw": losses(model, steps)}


def losses(model: Any, steps: int) -> list[float]:
    """Return the loss of every step."""
    import torch

    generator = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, model.config.vocab_size + 1)
    update = updater(model.train(), RATE)
    found = []
    for _ in range(steps):
        drawn = torch.multinomial(chances, ROWS * TOKENS, True, generator=generator)
        ids = drawn.view(ROWS, TOKENS)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update()
        found.append(loss.item())
    return found


def report(results: Results) -> str:
    """Return the largest differences and the line of the plot, which is written."""
    found = {
        dtype: results.entries[f"round=0/{dtype}"]
        for dtype in DTYPES
        if f"round=0/{dtype}" in results.entries
    }
    rows = [
        (
            dtype,
            digits(entry["peft"][0]),
            digits(entry["peft"][-1]),
            digits(entry["deltaw"][-1]),
            f"{difference(entry):.1e}",
        )
        for dtype, entry in found.items()
    ]
    panels = {
        dtype: {"PEFT": entry["peft"], "deltaw": entry["deltaw"]} for dtype, entry in found.items()
    }
    header = ("", "first loss", "last, PEFT", "last, deltaw", "largest difference / PEFT's loss")
    return (
        f"The 88M Llama with random weights, r=16 on all linear layers but the head, {STEPS} steps "
        f"of {ROWS} x {TOKENS} random tokens, AdamW at {RATE:g}; deltaw starts from the A and B "
        "that PEFT drew. In bfloat16 both round differently.\n\n"
        + table(header, rows)
        + "\n\n"
        + plots.curves(f"{results.name}-loss", "loss", "step", panels)
    )


def difference(entry: dict[str, list[float]]) -> float:
    """Return the largest relative difference of the two losses in any step."""
    pairs = zip(entry["deltaw"], entry["peft"], strict=True)
    return max(abs(ours - theirs) / theirs for ours, theirs in pairs)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
