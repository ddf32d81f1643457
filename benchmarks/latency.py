"""Latency at batch 1: merged and unmerged adapters against sequential ones.

Table 1 of the LoRA paper (arXiv 2106.09685) on the 88M Llama.
"""

import json
import statistics
import sys
from typing import Any

from benchmarks import rounds, shapes
from benchmarks.contestants import by_peft, ours
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import seconds

TITLE = "Latency at batch 1"
QUICK = False
LENGTHS = (128, 1)
WARMUP, MEASURED = 5, 40
CONTESTANTS = {
    "base": "no adapter",
    "merged": "LoRA, merged",
    "unmerged": "LoRA, unmerged",
    "peft": "LoRA, unmerged, PEFT",
    "bottleneck-16": "sequential adapters, width 16",
    "bottleneck-64": "sequential adapters, width 64",
}


def run(results: Results) -> None:
    """Measure every contestant in every round."""
    rounds.measure(results, tuple(CONTESTANTS))


def measure(name: str, shape: str = "llama-88m") -> dict[str, float]:
    """Measure one contestant at all lengths."""
    import torch

    torch.set_num_threads(2)
    model = prepare(name, shapes.build(shape)).eval()
    found = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            seconds(lambda ids=ids: model(input_ids=ids), WARMUP)
            taken = seconds(lambda ids=ids: model(input_ids=ids), MEASURED)
        found |= {f"{length}/fastest": min(taken), f"{length}/median": statistics.median(taken)}
    return found


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
            key = f"{length}/median"
            own, base = (rounds.values(results, which, key) for which in (name, "base"))
            row += [median(own.values(), 1e3), spread(rounds.ratios(own, base))]
        rows.append(row)
    columns = [(f"{n} tokens, ms" if n > 1 else "1 token, ms", "/ no adapter") for n in LENGTHS]
    return (
        "The forward pass of the 88M Llama in bfloat16 at batch 1, without cache and gradients. "
        "LoRA has r=16 on all linear layers but the head; sequential adapters (Houlsby et al.) "
        "stand after attention and after the MLP of every block. The median forward pass of a "
        f"process, as its median over {rounds.done(results)} interleaved rounds; ratios to the "
        "base within a round.\n\n" + table(("", *(c for pair in columns for c in pair)), rows)
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
