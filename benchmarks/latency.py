"""Latency at batch 1: merged and unmerged adapters against sequential ones.

Table 1 of the LoRA paper (arXiv 2106.09685) on the 88M Llama.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import rounds, shapes
from benchmarks.contestants import by_peft, ours
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import seconds

TITLE = "Latency at batch 1"
QUICK = False
LENGTHS = (128, 1)
PASSES = 9
CONTESTANTS = {
    "base": "no adapter",
    "merged": "LoRA, merged",
    "unmerged": "LoRA, unmerged",
    "peft": "LoRA, unmerged, PEFT",
    "bottleneck-16": "sequential adapters, width 16",
    "bottleneck-64": "sequential adapters, width 64",
}


def run(results: Results) -> None:
    """Let all take turns."""
    rounds.take_turns(results, tuple(CONTESTANTS))


def turns(name: str, shape: str = "llama-88m") -> Callable[[], dict[str, float]]:
    """Return the turns of one contestant: the median of some passes of each length."""
    import torch

    torch.set_num_threads(2)
    model = prepare(name, shapes.build(shape)).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        length: torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        for length in LENGTHS
    }

    def turn() -> dict[str, float]:
        with torch.no_grad():
            return {
                str(length): statistics.median(seconds(partial(model, input_ids=ids), PASSES))
                for length, ids in inputs.items()
            }

    return turn


def prepare(name: str, model: Any) -> Any:
    """Return the model with the adapters of one contestant."""
    import deltaw
    from benchmarks import bottleneck

    if name == "peft":
        return by_peft(model)
    if name in ("merged", "unmerged"):
        ours(model)
        shapes.randomise(model)
    if name == "merged":
        deltaw.merge(model, original="none")
    if name.startswith("bottleneck"):
        bottleneck.insert(model, int(name.partition("-")[2]))
    return model


def report(results: Results) -> str:
    """Return the latencies and their ratios to the base's."""
    rows = []
    for name, title in CONTESTANTS.items():
        row = [title]
        for length in LENGTHS:
            key = str(length)
            own, base = (rounds.values(results, which, key) for which in (name, "base"))
            row += [median(own.values(), 1e3), spread(rounds.ratios(own, base))]
        rows.append(row)
    columns = [(f"{n} tokens, ms" if n > 1 else "1 token, ms", "/ no adapter") for n in LENGTHS]
    return (
        "The forward pass of the 88M Llama in bfloat16 at batch 1, without cache and gradients. "
        "LoRA has r=16 on all linear layers but the head; sequential adapters (Houlsby et al.) "
        "stand after attention and after the MLP of every block. Every contestant "
        f"lives in a process of its own; a turn is {PASSES} passes, of which the median counts. "
        f"Medians of {rounds.done(results)} rounds, ratios to the base within a round.\n\n"
        + table(("", *(c for pair in columns for c in pair)), rows)
    )


if __name__ == "__main__":
    rounds.serve(turns(sys.argv[1]))
