"""A training step of every contestant: seconds, the optimiser's share, memory and page faults.

`llama88m.py` and others give shape, dtype, batches and contestants. What is measured is called
`BATCH/CONTESTANT`, as in `4x512/deltaw`: rows x tokens, and a name of `contestants.py`.
"""

import gc
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
    ("deltaw-dora", "deltaw"),
    ("peft-dora", "deltaw-dora"),
    ("peft-dora", "peft"),
    ("deltaw-lean", "floor"),
    ("deltaw-loss", "floor"),
    ("deltaw-loss", "floor-loss"),
)
"""What is divided by what."""


STEPS = 3
"""How many steps a turn has."""
HOW = (
    "Every contestant lives in a process of its own, and they take turns of {steps} steps, of "
    "which the fastest counts, since whatever else runs on the machine only adds to it. Numbers "
    "are medians of {rounds} rounds; ratios are taken within a round and shown as their median "
    "with the smallest and the largest. All linear layers but the head are adapted, r=16; fused "
    "AdamW, two threads, every token labelled. The floor is the forward and the backward pass "
    "through the frozen model to its embedded tokens, without adapters and optimiser. `fuse_loss` "
    "and `fuse_blocks` would work beside any adapter. Peak memory is the largest resident set of "
    "the process less its resident set with model, adapters and optimiser loaded; so gradients "
    "and the optimiser's state, which the first step makes, are in it. Page faults are the minor "
    "ones of a step."
)


@dataclass(frozen=True)
class Training:
    """One model, described in a sentence, and who is measured with which batches."""

    about: str
    shape: str
    dtype: str
    batches: Mapping[str, Sequence[str]]

    def run(self, results: Results) -> None:
        """Let the contestants of each batch take turns."""
        for batch, names in self.batches.items():
            rounds.take_turns(results, [f"{batch}/{name}" for name in names])

    def report(self, results: Results) -> str:
        """Return the tables of all batches and the lines of the plots, which are written."""
        parts = [f"{self.about} {HOW.format(steps=STEPS, rounds=rounds.done(results))}"]
        for batch, names in self.batches.items():
            rows = list(_rows(results, batch, names))
            if rows:
                parts += [
                    f"### {batch.replace('x', ' x ')} tokens",
                    table(
                        (
                            "",
                            "step, ms",
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
                        _pairs(results, batch, names),
                    ),
                ]
        return "\n\n".join([*parts, *_plots(results, self)])

    def serve(self, which: str) -> None:
        """Take the turns of one contestant with one batch in this process."""
        import torch

        torch.set_num_threads(2)
        batch, name = which.split("/")
        model = CONTESTANTS[name].prepare(shapes.build(self.shape, self.dtype)).train()
        step = stepper(model, batch)
        rounds.serve(lambda: fastest_of([step() for _ in range(STEPS)]))


def stepper(model: Any, batch: str) -> Callable[[], dict[str, float]]:
    """Return a training step on a batch of random tokens, which returns what it cost."""
    import torch

    rows, tokens = map(int, batch.split("x"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    update = updater(model)
    gc.collect()
    loaded = memory.resident()

    def step() -> dict[str, float]:
        faults = memory.page_faults()
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        middle = time.perf_counter()
        update()
        ended = time.perf_counter()
        return {
            "seconds": ended - began,
            "optimiser": (ended - middle) / (ended - began),
            "peak": memory.peak() - loaded,
            "faults": memory.page_faults() - faults,
        }

    return step


def fastest_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the fastest step."""
    return min(steps, key=lambda step: step["seconds"])


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


def _rows(results: Results, batch: str, names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Yield what is known of every contestant."""
    for name in names:
        known = {
            key: rounds.values(results, f"{batch}/{name}", key)
            for key in ("seconds", "optimiser", "peak", "faults")
        }
        if known["seconds"]:
            yield (
                CONTESTANTS[name].title,
                median(known["seconds"].values(), 1e3),
                _ratio(results, batch, name, "floor", "seconds"),
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
                _ratio(results, batch, above, below, "seconds"),
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
        ("seconds", 1e3, "training step, ms"),
        ("peak", 1e-6, "peak memory above the loaded model, MB"),
    ):
        panels = {
            f"{batch.replace('x', ' x ')} tokens": {
                CONTESTANTS[name].title.replace("`", ""): [v * scale for v in found.values()]
                for name in names
                if (found := rounds.values(results, f"{batch}/{name}", key))
            }
            for batch, names in training.batches.items()
        }
        panels = {title: bars for title, bars in panels.items() if bars}
        if panels:
            yield plots.bars(f"{results.name}-{key}", what, panels)
