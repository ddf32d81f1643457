"""Four adapters trained at once over one pass of the base, or one after another."""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks import rounds, shapes
from benchmarks.contestants import ALPHA, RANK
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import fastest

TITLE = "Several adapters trained at once"
QUICK = False
JOBS = ("a", "b", "c", "d")
TOKENS = 128
STEPS = 2
MODELS = {"llama-88m": "Llama of 88M", "tinyllama-1.1b": "TinyLlama-1.1B's shape"}


def run(results: Results) -> None:
    """Let both ways take turns of one step of all jobs, with each model."""
    for shape in MODELS:
        rounds.take_turns(results, [f"{shape}/{way}" for way in ("together", "apart")])


def prepare(which: str) -> Callable[[], dict[str, float]]:
    """Return the turns of one way with one model."""
    import torch

    torch.set_num_threads(2)
    shape, way = which.split("/")
    step = steps(shapes.build(shape))[way]
    return lambda: {"seconds": fastest(step, STEPS)}


def steps(model: Any) -> dict[str, Callable[[], None]]:
    """Return a step of all jobs by way; both have an optimiser for every adapter."""
    import torch

    import deltaw

    config = deltaw.LoraConfig(r=RANK, lora_alpha=ALPHA)
    optimizers = []
    for name in JOBS:
        deltaw.attach(model, config, name)
        own = [p for path, p in model.named_parameters() if f".adapter.{name}." in path]
        optimizers.append(torch.optim.AdamW(own, lr=1e-4, fused=True))
    model.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (len(JOBS), TOKENS), generator=generator)

    def together() -> None:
        with deltaw.rows(model, JOBS):
            # All rows have as many tokens, so that this is the sum of the jobs' own losses.
            (len(JOBS) * model(input_ids=ids, labels=ids).loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def apart() -> None:
        for name, optimizer, row in zip(JOBS, optimizers, ids.split(1), strict=True):
            deltaw.activate(model, name)
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"together": together, "apart": apart}


def report(results: Results) -> str:
    """Return the times of both ways and what training together gains."""
    rows = []
    for shape, title in MODELS.items():
        together, apart = (
            rounds.values(results, f"{shape}/{way}", "seconds") for way in ("together", "apart")
        )
        if together and apart:
            rows.append(
                (
                    title,
                    median(together.values(), 1e3),
                    median(apart.values(), 1e3),
                    spread(rounds.ratios(apart, together)),
                )
            )
    header = ("", "together, ms", "one after another, ms", "one after another / together")
    return (
        f"{len(JOBS)} jobs of {TOKENS} tokens each in bfloat16, every one with its own adapter of "
        "r=16 on all linear layers but the head, its own loss and its own AdamW: all rows in one "
        "pass through the base, or each job's step alone. Both ways live in processes "
        "of their own and take turns of "
        f"{STEPS} steps of all jobs, of which the fastest counts. Medians of "
        f"{rounds.done(results)} rounds, ratios within a round.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    rounds.serve(prepare(sys.argv[1]))
