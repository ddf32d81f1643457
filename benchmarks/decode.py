"""A decoding step of a Llama of TinyLlama-1.1B's shape under adapters that differ by row.

What is measured is called `ROWS/ADAPTERS/CONTESTANT`: `8/200/deltaw` has 200 adapters registered,
of which every row uses another one.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import rounds, shapes
from benchmarks.contestants import ALPHA, RANK, peft_config
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import seconds

TITLE = "Decoding, TinyLlama-1.1B's shape, bfloat16"
QUICK = False
CONTEXT = 64
STEPS = 3
CASES = {
    "8/0/base": "8 rows, no adapter",
    "8/1/deltaw": "8 rows, one adapter, deltaw",
    "8/1/peft": "8 rows, one adapter, PEFT",
    "8/8/deltaw": "8 rows, 8 adapters, deltaw",
    "8/8/peft": "8 rows, 8 adapters, PEFT",
    "64/0/base": "64 rows, no adapter",
    "64/64/deltaw": "64 rows, 64 adapters, deltaw",
    "64/64/peft": "64 rows, 64 adapters, PEFT",
    "8/8/deltaw:beside": "8 rows, 8 adapters, deltaw (beside 200)",
    "8/200/deltaw": "8 rows, 8 of 200 adapters, deltaw",
}
GROUPS = (
    ("8/0/base", "8/1/deltaw", "8/1/peft", "8/8/deltaw", "8/8/peft"),
    ("64/0/base", "64/64/deltaw", "64/64/peft"),
    ("8/8/deltaw:beside", "8/200/deltaw"),
)
"""Which cases take turns: those that are in memory side by side."""
PAIRS = (
    ("8/1/deltaw", "8/0/base"),
    ("8/1/peft", "8/1/deltaw"),
    ("8/8/deltaw", "8/0/base"),
    ("8/8/peft", "8/0/base"),
    ("8/8/peft", "8/8/deltaw"),
    ("64/64/deltaw", "64/0/base"),
    ("64/64/peft", "64/0/base"),
    ("64/64/peft", "64/64/deltaw"),
    ("8/200/deltaw", "8/8/deltaw:beside"),
)
"""What is divided by what."""


def run(results: Results) -> None:
    """Let the cases take turns that fit into memory side by side."""
    for group in GROUPS:
        rounds.take_turns(results, group)


def prepare(which: str, shape: str = "tinyllama-1.1b") -> Callable[[], dict[str, float]]:
    """Return the turns of one case: some steps, of which the fastest counts."""
    import torch

    torch.set_num_threads(2)
    rows, adapters, name = which.partition(":")[0].split("/")
    model = shapes.build(shape).eval()
    decoders = {"base": by_base, "deltaw": by_deltaw, "peft": by_peft}
    forward = decoders[name](model, int(rows), int(adapters))
    step, restore = stepper(forward, model.config, int(rows))

    def turn() -> dict[str, float]:
        with torch.no_grad():
            taken = seconds(step, STEPS, restore)
            restore()
        return {"seconds": min(taken)}

    return turn


def by_base(model: Any, rows: int, adapters: int) -> Callable[..., object]:
    """Return the forward of the model as it is."""
    return model


def by_deltaw(model: Any, rows: int, adapters: int) -> Callable[..., object]:
    """Return the forward of deltaw, within a block that gives every row its adapter."""
    import deltaw

    deltaw.attach(model, deltaw.LoraConfig(r=RANK, lora_alpha=ALPHA), "a0", trainable=False)
    shapes.randomise(model)
    for number in range(1, adapters):
        deltaw.attach(model, deltaw.capture(model, "a0"), f"a{number}", trainable=False)
    if adapters > 1:
        deltaw.rows(model, spaced(adapters, rows)).__enter__()
    return model


def by_peft(model: Any, rows: int, adapters: int) -> Callable[..., object]:
    """Return the forward of PEFT."""
    import peft

    tuned = peft.get_peft_model(model, peft_config(), "a0")
    for number in range(1, adapters):
        tuned.add_adapter(f"a{number}", peft_config())
    tuned.eval()
    return tuned if adapters == 1 else partial(tuned, adapter_names=spaced(adapters, rows))


def spaced(adapters: int, rows: int) -> list[str]:
    """Return a name for each row, as far apart as can be."""
    return [f"a{row * adapters // rows}" for row in range(rows)]


def stepper(
    forward: Callable[..., object], config: Any, rows: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step of one new token per row, and what takes that token out of the cache again."""
    import torch
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache(config=config)
    size = (rows, config.num_key_value_heads, CONTEXT, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, *size, generator=generator).to(torch.bfloat16)
        cache.update(keys, values, layer)
    token = torch.randint(0, config.vocab_size, (rows, 1), generator=generator)
    step = partial(forward, input_ids=token, cache=cache, use_cache=True)
    return step, partial(cache.crop, -1)


def report(results: Results) -> str:
    """Return the times of a step, and the ratios."""
    known = {name: rounds.values(results, name, "seconds") for name in CASES}
    times = [
        (title, median(known[name].values(), 1e3)) for name, title in CASES.items() if known[name]
    ]
    pairs = [
        (CASES[above], CASES[below], spread(found))
        for above, below in PAIRS
        if (found := rounds.ratios(known[above], known[below]))
    ]
    return (
        f"One new token per row after {CONTEXT} tokens in the cache, without gradients; adapters "
        "of r=16 in float32 on all linear layers but the head. Every case lives in a process of "
        f"its own; a turn is {STEPS} steps, of which the fastest counts. Medians of "
        f"{rounds.done(results)} rounds, ratios within a round.\n\n"
        + table(("", "step, ms"), times)
        + "\n\n"
        + table(("divided", "by", "step"), pairs)
    )


if __name__ == "__main__":
    rounds.serve(prepare(sys.argv[1]))
