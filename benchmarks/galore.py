"""GaLore against AdamW on every weight: bytes of state, peak memory, seconds, and the loss.

Memory is that of the 88M Llama in float32, in a fresh process for each optimiser. The loss is that
of stories260K on held-out stories after some steps, from its own weights and from random ones; the
learning rate of each optimiser is chosen with the first seed. Reads model and stories beside the
checkout (`DELTAW_SHARED`); every run that is done is kept, so an interrupted benchmark goes on.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import memory, rounds, shapes
from benchmarks.results import Results
from benchmarks.tables import median, spread, table

TITLE = "GaLore and AdamW on every weight"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
OPTIMIZERS = {
    "adamw": "AdamW",
    "galore": "GaLore",
    "galore-layerwise": "GaLore, updates in the backward pass",
}
ROUNDS = 3
ROWS, TOKENS = 1, 256
STEPS = 4
RANK = 128

STARTS = {"trained": "its own weights", "random": "random weights"}
SEEDS = (0, 1, 2)
LOSS_STEPS, LOSS_ROWS, LOSS_TOKENS = 300, 8, 256
LOSS_RANK, LOSS_GAP = 16, 50
HELD_OUT = 100
RATES = {
    ("trained", "adamw"): (1e-4, 3e-4, 1e-3),
    ("trained", "galore"): (4e-4, 1.2e-3, 4e-3),
    ("random", "adamw"): (1e-3, 3e-3, 1e-2),
    ("random", "galore"): (1e-2, 3e-2, 1e-1),
}
"""The learning rates tried; GaLore's is multiplied by its scale of 0.25 on projected weights."""


def run(results: Results) -> None:
    """Measure memory in rounds, then do every training run that is not done yet."""
    rounds.measure(results, tuple(OPTIMIZERS), rounds=ROUNDS)
    for start, name in RATES:
        for rate, seed in schedule(results, start, name):
            entry = {"loss": train(start, name, rate, seed)}
            results.add(key(start, name, rate, seed), entry)
            print(key(start, name, rate, seed), entry, flush=True)


def schedule(results: Results, start: str, name: str) -> Iterator[tuple[float, int]]:
    """Yield (rate, seed) of the runs to do: all rates with the first seed, the best with all."""
    for rate in RATES[start, name]:
        if key(start, name, rate, SEEDS[0]) not in results.entries:
            yield rate, SEEDS[0]
    best = best_rate(results, start, name)
    for seed in SEEDS:
        if key(start, name, best, seed) not in results.entries:
            yield best, seed


def best_rate(results: Results, start: str, name: str) -> float:
    """Return the rate with the lowest loss of the first seed."""
    return min(
        RATES[start, name],
        key=lambda rate: results.entries[key(start, name, rate, SEEDS[0])]["loss"],
    )


def key(start: str, name: str, rate: float, seed: int) -> str:
    """Return under what name the entry of a training run is kept."""
    return f"loss/{start}/{name}/lr={rate:g}/seed={seed}"


def measure(name: str, shape: str = "llama-88m", rank: int = RANK) -> dict[str, float]:
    """Return bytes of state, peak memory above the loaded model, and seconds of a later step."""
    import torch

    torch.set_num_threads(2)
    model = shapes.build(shape, "float32").train()
    loaded = memory.resident()
    optimizer = optimizer_of(name, model, 1e-4, rank)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=generator)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    return {
        "state": sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)),
        "peak": memory.peak() - loaded,
        "first": seconds[0],
        "seconds": min(seconds[1:]),
    }


def optimizer_of(name: str, model: Any, rate: float, rank: int, gap: int = 200) -> Any:
    """Return an optimiser of every weight."""
    import torch

    from deltaw.optim import galore

    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate)
    groups = galore.groups(model, rank, gap)
    return galore.GaLoreAdamW(groups, lr=rate, layerwise=name.endswith("layerwise"))


def train(start: str, name: str, rate: float, seed: int, steps: int = LOSS_STEPS) -> float:
    """Return the mean loss on held-out stories after some steps with warm-up and a linear end."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, known, held_out = stories(start)
    optimizer = optimizer_of(name, model, rate, LOSS_RANK, LOSS_GAP)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = windows(known, torch.randint(len(known) - LOSS_TOKENS, (LOSS_ROWS,), generator=draw))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ids = windows(held_out, torch.arange(0, len(held_out) - LOSS_TOKENS, LOSS_TOKENS))
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def stories(start: str) -> tuple[Any, Any, Any]:
    """Return the model, and the tokens of the stories to train on and of those held out."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = SHARED / "models" / "stories260K" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if start == "random":
        model = LlamaForCausalLM(model.config)
    lines = (SHARED / "data" / "tinystories_2mb" / "stories.jsonl").read_text("utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["text"], verbose=False)["input_ids"] for line in lines]

    def joined(part: list[list[int]]) -> torch.Tensor:
        return torch.tensor([token for story in part for token in story])

    return model, joined(ids[:-HELD_OUT]), joined(ids[-HELD_OUT:])


def windows(tokens: Any, starts: Any) -> Any:
    """Return one row of tokens from each start on."""
    import torch

    return tokens[starts[:, None] + torch.arange(LOSS_TOKENS)]


def report(results: Results) -> str:
    """Return the tables of memory and of losses."""
    counted = len(rounds.values(results, "adamw", "peak"))
    return "\n\n".join(
        [
            "Every weight of the 88M Llama is trained in float32, each optimiser in a fresh "
            f"process; {counted} rounds of {STEPS} steps of {ROWS} x {TOKENS} tokens. GaLore "
            f"projects the linear layers but the head to rank {RANK}. Peak memory is the largest "
            "resident set less that with the model loaded. The first step also takes the "
            "projectors, as every 200th does; the other is the fastest later one. Seconds were "
            "taken beside other work and are rough; bytes are not touched by that.",
            table(
                ("", "state, MB", "/ AdamW", "peak, MB", "/ AdamW", "step, ms", "first step, ms"),
                _costs(results),
            ),
            f"stories260K on TinyStories: {LOSS_STEPS} steps of {LOSS_ROWS} x {LOSS_TOKENS} "
            f"tokens, rank {LOSS_RANK}, projectors taken every {LOSS_GAP} steps, scale 0.25; the "
            f"mean loss on {HELD_OUT} stories that were not trained on, though the trained weights "
            "may have seen them. The rate is the best of three with the first seed; a seed draws "
            "the batches and the random weights.",
            table(
                ("start", "AdamW's rate", "loss", "GaLore's rate", "loss", "GaLore / AdamW"),
                _losses(results),
            ),
        ]
    )


def _costs(results: Results) -> Iterator[tuple[str, ...]]:
    for name, title in OPTIMIZERS.items():
        found = {
            what: rounds.values(results, name, what)
            for what in ("state", "peak", "seconds", "first")
        }
        if found["peak"]:
            yield (
                title,
                median(found["state"].values(), 1e-6),
                spread(rounds.ratios(found["state"], rounds.values(results, "adamw", "state"))),
                median(found["peak"].values(), 1e-6),
                spread(rounds.ratios(found["peak"], rounds.values(results, "adamw", "peak"))),
                median(found["seconds"].values(), 1e3),
                median(found["first"].values(), 1e3),
            )


def _losses(results: Results) -> Iterator[tuple[str, ...]]:
    wanted = {
        key(start, name, rate, SEEDS[0]) for (start, name), all_ in RATES.items() for rate in all_
    }
    if not wanted <= results.entries.keys():
        return
    for start, title in STARTS.items():
        cells = []
        losses = []
        for name in ("adamw", "galore"):
            best = best_rate(results, start, name)
            entries = [results.entries.get(key(start, name, best, seed)) for seed in SEEDS]
            losses.append([entry["loss"] for entry in entries if entry])
            cells += [f"{best:g}", spread(losses[-1])]
        ratios = [ours / theirs for theirs, ours in zip(*losses, strict=True)]
        yield (title, *cells, _ratios(ratios))


def _ratios(ratios: list[float]) -> str:
    """Return the median ratio with the smallest and the largest, to four digits."""
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
