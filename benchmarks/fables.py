"""Loss against rank, and what is forgotten for it: stories260K learns Aesop's fables.

Every weight, and LoRA of several ranks on all linear layers; the learning rate of each by the
validation part with the first seed, then three seeds. All along the run the loss on the base's own
domain, TinyStories, is told beside it. Reads model and texts beside the checkout
(`DELTAW_SHARED`); every run that is done is kept, so an interrupted benchmark goes on.
"""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.results import Results
from benchmarks.tables import table

TITLE = "Loss against rank, and forgetting: Aesop's fables"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
RANKS = (1, 2, 4, 8, 16, 64)
METHODS = ("full", *(f"LoRA r={r}" for r in RANKS))
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST = {name: slice(2, 6) if name == "full" else slice(4, 8) for name in METHODS}
"""The rates of the ladder that are tried first; more are, while the best of them is the last."""
SEEDS = (0, 1, 2)
STEPS, ROWS, TOKENS = 240, 8, 256
EVERY = 20
STORIES = 40
EIGHTH = 8
"""Every eighth of the training fables chooses rates and states."""
PARTS = ("valid", "test", "stories")
COLUMNS = ("loss on fables", "forgotten", "forgotten at equal loss")


def run(results: Results) -> None:
    """Do every training run that is not done yet."""
    for name in METHODS:
        for rate, seed in _schedule(results, name):
            entry = train(name, rate, seed)
            results.add(key(name, rate, seed), entry)
            print(key(name, rate, seed), min(entry["valid"]), flush=True)


def key(name: str, rate: float, seed: int) -> str:
    """Return under what name the entry of a run is kept."""
    return f"{name}/lr={rate:g}/seed={seed}"


def _schedule(results: Results, name: str) -> Iterator[tuple[float, int]]:
    """Yield (rate, seed) of the runs to do: rates with the first seed, the best with all."""
    while rates := missing(results, name):
        yield rates[0], SEEDS[0]
    best = best_rate(results, name)
    for seed in SEEDS:
        if key(name, best, seed) not in results.entries:
            yield best, seed


def missing(results: Results, name: str) -> list[float]:
    """Return the rates to try next: the first ones, then those around the best."""
    rates = [*LADDER[FIRST[name]]]
    if all(key(name, rate, SEEDS[0]) in results.entries for rate in rates):
        place = LADDER.index(best_rate(results, name))
        rates = [*LADDER[max(place - 1, 0) : place + 2]]
    return [rate for rate in rates if key(name, rate, SEEDS[0]) not in results.entries]


def best_rate(results: Results, name: str) -> float:
    """Return the rate whose lowest validation loss of the first seed is lowest."""
    tried = [rate for rate in LADDER if key(name, rate, SEEDS[0]) in results.entries]
    return min(tried, key=lambda rate: min(results.entries[key(name, rate, SEEDS[0])]["valid"]))


def train(name: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Return the losses of all parts before the first step and after every `EVERY` ones."""
    import torch

    import deltaw
    from deltaw.language.encoding.batches import Padding
    from deltaw.language.scores import measured, ratios

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, rows = texts()
    if name != "full":
        deltaw.attach(model, deltaw.LoraConfig(r=int(name.split("=")[1])))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    padding = Padding(0)
    curves: dict[str, list[float]] = {part: [] for part in PARTS}

    def look() -> None:
        for part in PARTS:
            curves[part].append(float(ratios(measured(model, rows[part], padding).sum(0))["loss"]))

    draw = torch.Generator().manual_seed(seed)
    look()
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < ROWS:
            order += torch.randperm(len(rows["train"]), generator=draw).tolist()
        some, order = order[:ROWS], order[ROWS:]
        batch = padding(
            [
                {"input_ids": row.input_ids, "labels": row.labels}
                for row in (rows["train"][index] for index in some)
            ]
        )
        model.train()
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == 0:
            look()
    return {**curves, "trainable": sum(p.numel() for p in trained)}


def texts() -> tuple[Any, dict[str, list[Any]]]:
    """Return the model, and the rows of every part."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from deltaw.language.data.samples import Passage
    from deltaw.language.encoding.encoder import Encoder
    from deltaw.language.encoding.templating import choose, ends

    folder = SHARED / "models" / "stories260K" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, choose(tokenizer, None).template, TOKENS, ends(tokenizer))

    def lines(name: str) -> list[str]:
        return (SHARED / "data" / name).read_text("utf-8").splitlines()

    fables = lines("aesop_fables/train.jsonl")
    parts = {
        "train": [line for number, line in enumerate(fables) if number % EIGHTH],
        "valid": fables[::EIGHTH],
        "test": lines("aesop_fables/valid.jsonl"),
        "stories": lines("tinystories_2mb/stories.jsonl")[-STORIES:],
    }
    rows = {
        part: encoder.encode([Passage(json.loads(line)["text"], part, 1) for line in some]).rows
        for part, some in parts.items()
    }
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), rows


def report(results: Results) -> str:
    """Return the table of losses and of what was forgotten."""
    done = [
        name
        for name in METHODS
        if not missing(results, name)
        and all(key(name, best_rate(results, name), seed) in results.entries for seed in SEEDS)
    ]
    if not done:
        return "No method is done yet."
    entries = {
        name: [results.entries[key(name, best_rate(results, name), seed)] for seed in SEEDS]
        for name in done
    }
    first = entries[done[0]][0]
    level = max(min(entry["valid"]) for runs in entries.values() for entry in runs)
    found = {name: [_outcome(entry, level) for entry in runs] for name, runs in entries.items()}
    rows = [
        (
            name,
            f"{entries[name][0]['trainable']:,}",
            f"{best_rate(results, name):g}",
            *(_mean([outcome[column] for outcome in outcomes]) for column in COLUMNS),
        )
        for name, outcomes in found.items()
    ]
    return "\n\n".join(
        [
            f"{STEPS} steps of {ROWS} texts of at most {TOKENS} tokens, AdamW with warm-up and a "
            "linear end, alpha = 2 r, float32; losses in nats per token, mean ± standard error of "
            f"{len(SEEDS)} seeds. Before training the loss on the fables' test part is "
            f"{first['test'][0]:.3f} and on TinyStories {first['stories'][0]:.3f}. The state with "
            "the lowest validation loss counts, and the rate that is best between two others that "
            "were tried with the first seed. Forgotten is how much the loss on TinyStories rose: "
            f"in that state, and at equal task loss, where each run first reaches {level:.3f} on "
            "the validation part (the best of the weakest run), between evaluations by a straight "
            "line.",
            table(("method", "trained", "rate", *COLUMNS), rows),
            *_plots(results, found),
        ]
    )


def _outcome(entry: dict[str, Any], level: float) -> dict[str, float]:
    """Return what a run reached and forgot, by the columns of the table."""
    best, before = _best(entry), entry["stories"][0]
    numbers = entry["test"][best], entry["stories"][best] - before, _at(entry, level) - before
    return dict(zip(COLUMNS, numbers, strict=True))


def _plots(results: Results, found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Yield the line that shows the plot of each column over the rank, once all is done."""
    if set(found) < set(METHODS):
        return
    panels = {
        column: (
            {rank: [outcome[column] for outcome in found[f"LoRA r={rank}"]] for rank in RANKS},
            [outcome[column] for outcome in found["full"]],
        )
        for column in COLUMNS
    }
    what = "loss and forgetting over rank"
    yield plots.along(f"{results.name}-rank", what, "rank of LoRA", panels, "full")


def _best(entry: dict[str, Any]) -> int:
    return min(range(len(entry["valid"])), key=entry["valid"].__getitem__)


def _at(entry: dict[str, Any], level: float) -> float:
    """Return the loss on stories where the validation loss first falls to `level`."""
    pairs = list(zip(entry["valid"], entry["stories"], strict=True))
    for (high, before), (low, after) in pairwise(pairs):
        if low <= level < high:
            return before + (high - level) / (high - low) * (after - before)
    return pairs[0][1] if pairs[0][0] <= level else pairs[_best(entry)][1]


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"
