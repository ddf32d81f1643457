"""A training step of every contestant: seconds, the optimiser's share, memory and page faults.

`llama88m.py` and others give shape, dtype, batches and contestants. What is measured is called
`BATCH/CONTESTANT`, as in `4x512/deltaw`: rows x tokens, and a name of `contestants.py`.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import memory, plots, rounds, shapes
from benchmarks.contestants import CONTESTANTS
from benchmarks.results import Results
from benchmarks.tables import median, percent, spread, table

PAIRS = (
    ("peft", "deltaw"),
    ("peft", "deltaw-lean"),
    ("peft-bf16", "deltaw"),
    ("loralib", "deltaw"),
    ("full", "deltaw"),
    ("full", "deltaw-lean"),
    ("peft-dropout", "deltaw-dropout"),
    ("deltaw-dropout", "deltaw"),
    ("peft-dropout", "peft"),
    ("deltaw-lean", "floor"),
    ("deltaw-loss", "floor"),
    ("deltaw-loss", "floor-loss"),
)
"""What is divided by what."""


@dataclass(frozen=True)
class Batch:
    """Who is measured with it, and how many steps a process takes before and while it measures."""

    warmup: int
    measured: int
    contestants: Sequence[str]


@dataclass(frozen=True)
class Training:
    """One model and what is measured with it."""

    shape: str
    dtype: str
    batches: Mapping[str, Batch]

    def names(self) -> list[str]:
        """Return everything that is measured."""
        return [
            f"{key}/{name}" for key, batch in self.batches.items() for name in batch.contestants
        ]

    def measure(self, which: str) -> dict[str, float]:
        """Measure one contestant with one batch in this process."""
        import torch

        torch.set_num_threads(2)
        batch, name = which.split("/")
        model = CONTESTANTS[name].prepare(shapes.build(self.shape, self.dtype)).train()
        return measure_steps(model, batch, self.batches[batch])


def measure_steps(model: Any, batch: str, steps: Batch) -> dict[str, float]:
    """Return what a training step costs on a batch of random tokens."""
    import torch

    rows, tokens = map(int, batch.split("x"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    update = updater(model)
    gc.collect()
    loaded = memory.resident()

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        middle = time.perf_counter()
        update()
        return time.perf_counter() - began, time.perf_counter() - middle

    for _ in range(steps.warmup):
        step()
    faults = memory.page_faults()
    taken = [step() for _ in range(steps.measured)]
    faults = memory.page_faults() - faults
    return {
        "fastest": min(whole for whole, _ in taken),
        "median": statistics.median(whole for whole, _ in taken),
        "optimiser": statistics.median(own / whole for whole, own in taken),
        "peak": memory.peak() - loaded,
        "faults": faults / steps.measured,
    }


def updater(model: Any, rate: float = 1e-4) -> Callable[[], None]:
    """Return what updates the trained weights and drops their gradients; nothing for a floor."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return lambda: None
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def report(results: Results, training: Training) -> str:
    """Return the tables of all batches and the lines of the plots, which are written."""
    parts = [
        "A process takes some steps, of which the first do not count; the fastest of the others is "
        "the time of a step, and their median is shown beside it. Numbers are medians of "
        f"{rounds.done(results)} interleaved rounds; ratios are taken within a round and shown as "
        "their median with the smallest and the largest. All linear layers but the head are "
        "adapted, r=16; fused AdamW, two threads, every token labelled. The floor is the forward "
        "and the backward pass through the frozen model to its embedded tokens, without adapters "
        "and optimiser. `fuse_loss` and `fuse_blocks` would work beside any adapter. Peak memory "
        "is the largest resident set of the fresh process less its resident set with model, "
        "adapters and optimiser loaded; so gradients and the optimiser's state, which the first "
        "step makes, are in it. Page faults are the minor ones of a step."
    ]
    for batch, own in training.batches.items():
        rows = list(_rows(results, batch, own.contestants))
        if rows:
            parts += [
                f"### {batch.replace('x', ' x ')} tokens",
                table(
                    (
                        "",
                        "step, ms",
                        "median, ms",
                        "step / floor",
                        "optimiser's share",
                        "peak memory, MB",
                        "peak / floor",
                        "page faults",
                    ),
                    rows,
                ),
                table(
                    ("divided", "by", "step", "peak memory"),
                    _pairs(results, batch, own.contestants),
                ),
            ]
    return "\n\n".join([*parts, *_plots(results, training)])


def _rows(results: Results, batch: str, names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Yield what is known of every contestant."""
    for name in names:
        known = {
            key: rounds.values(results, f"{batch}/{name}", key)
            for key in ("fastest", "median", "optimiser", "peak", "faults")
        }
        if known["fastest"]:
            yield (
                CONTESTANTS[name].title,
                median(known["fastest"].values(), 1e3),
                median(known["median"].values(), 1e3),
                _ratio(results, batch, name, "floor", "fastest"),
                percent(known["optimiser"].values()),
                median(known["peak"].values(), 1e-6),
                _ratio(results, batch, name, "floor", "peak"),
                median(known["faults"].values()),
            )


def _pairs(results: Results, batch: str, names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Yield the ratios of the contestants that are compared."""
    for above, below in PAIRS:
        if above in names and below in names:
            yield (
                CONTESTANTS[above].title,
                CONTESTANTS[below].title,
                _ratio(results, batch, above, below, "fastest"),
                _ratio(results, batch, above, below, "peak"),
            )


def _ratio(results: Results, batch: str, above: str, below: str, key: str) -> str:
    return spread(
        rounds.ratios(
            rounds.values(results, f"{batch}/{above}", key),
            rounds.values(results, f"{batch}/{below}", key),
        )
    )


def _plots(results: Results, training: Training) -> Iterable[str]:
    """Write the plots and yield the lines that show them."""
    for key, scale, what in (
        ("fastest", 1e3, "training step, ms"),
        ("peak", 1e-6, "peak memory above the loaded model, MB"),
    ):
        panels = {
            f"{batch.replace('x', ' x ')} tokens": {
                CONTESTANTS[name].title.replace("`", ""): [v * scale for v in found.values()]
                for name in own.contestants
                if (found := rounds.values(results, f"{batch}/{name}", key))
            }
            for batch, own in training.batches.items()
        }
        panels = {title: bars for title, bars in panels.items() if bars}
        if panels:
            yield plots.bars(f"{results.name}-{key}", what, panels)
