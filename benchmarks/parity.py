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
CASES = {
    "float32": ("float32", 1e-4),
    "bfloat16": ("bfloat16", 1e-4),
    "float32, ten times the rate": ("float32", 1e-3),
}
"""Dtype and learning rate."""
STEPS = 100
ROWS, TOKENS = 4, 64


def run(results: Results) -> None:
    """Train both once in every case; a second time would give the same."""
    rounds.measure(results, tuple(CASES), rounds=1)


def measure(case: str, shape: str = "llama-88m", steps: int = STEPS) -> dict[str, list[float]]:
    """Train PEFT's model, and deltaw's from the adapter that PEFT saved before."""
    import torch

    import deltaw

    torch.set_num_threads(2)
    torch.manual_seed(0)
    dtype, rate = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        tuned = by_peft(shapes.build(shape, dtype))
        tuned.save_pretrained(folder)
        theirs = losses(tuned, rate, steps)
        model = shapes.build(shape, dtype)
        deltaw.load(model, folder, trainable=True)
        return {"peft": theirs, "deltaw": losses(model, rate, steps)}


def losses(model: Any, rate: float, steps: int) -> list[float]:
    """Return the loss of every step."""
    import torch

    generator = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, model.config.vocab_size + 1)
    update = updater(model.train(), rate)
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
        case: results.entries[f"round=0/{case}"]
        for case in CASES
        if f"round=0/{case}" in results.entries
    }
    rows = [
        (
            case,
            digits(entry["peft"][0]),
            digits(entry["peft"][-1]),
            digits(entry["deltaw"][-1]),
            f"{difference(entry):.1e}",
        )
        for case, entry in found.items()
    ]
    panels = {
        case: {"PEFT": entry["peft"], "deltaw": entry["deltaw"]} for case, entry in found.items()
    }
    header = ("", "first loss", "last, PEFT", "last, deltaw", "largest difference / PEFT's loss")
    return (
        f"The 88M Llama with random weights, r=16 on all linear layers but the head, {STEPS} steps "
        f"of {ROWS} x {TOKENS} random tokens, AdamW at 1e-4; deltaw starts from the A and B that "
        "PEFT drew. The two add in another order and round differently; AdamW divides by gradients "
        "that may be all rounding, which shows at the higher rate.\n\n"
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
