"""The summary on top of the page: ratios of several benchmarks, where they were measured."""

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import spread, table

STEP = "training step, Llama of 88M, bfloat16, 4 x 512 tokens"
PEAK = "its peak memory above the loaded model"
SAVED = "bytes saved for the backward pass, blocks of the 88M Llama"
LEAN = "deltaw with `fuse_loss` and `fuse_blocks`"


class Headline(NamedTuple):
    """What of which benchmark is divided by what: contestant and key of each."""

    benchmark: str
    what: str
    divided: str
    by: str
    above: tuple[str, str]
    below: tuple[str, str]


HEADLINES = (
    Headline(
        "llama88m", STEP, "PEFT", "deltaw", ("4x512/peft", "seconds"), ("4x512/deltaw", "seconds")
    ),
    Headline(
        "llama88m", STEP, "PEFT", LEAN, ("4x512/peft", "seconds"), ("4x512/deltaw-lean", "seconds")
    ),
    Headline(
        "llama88m",
        STEP,
        "all weights",
        LEAN,
        ("4x512/full", "seconds"),
        ("4x512/deltaw-lean", "seconds"),
    ),
    Headline(
        "llama88m",
        STEP,
        "deltaw",
        "frozen, no adapters",
        ("4x512/deltaw", "seconds"),
        ("4x512/floor", "seconds"),
    ),
    Headline("llama88m", PEAK, "PEFT", "deltaw", ("4x512/peft", "peak"), ("4x512/deltaw", "peak")),
    Headline("llama88m", PEAK, "PEFT", LEAN, ("4x512/peft", "peak"), ("4x512/deltaw-lean", "peak")),
    Headline(
        "saved_bytes", SAVED, "PEFT", "deltaw", ("blocks/peft", "bytes"), ("blocks/deltaw", "bytes")
    ),
    Headline(
        "saved_bytes",
        SAVED,
        "PEFT",
        "deltaw with `fuse_blocks`",
        ("blocks/peft", "bytes"),
        ("blocks/deltaw-blocks", "bytes"),
    ),
    Headline(
        "several",
        "step of four jobs, TinyLlama-1.1B's shape",
        "one after another",
        "together",
        ("tinyllama-1.1b/apart", "seconds"),
        ("tinyllama-1.1b/together", "seconds"),
    ),
    Headline(
        "decode",
        "decoding step, 8 rows, 8 adapters, TinyLlama-1.1B's shape",
        "PEFT",
        "deltaw",
        ("8/8/peft", "seconds"),
        ("8/8/deltaw", "seconds"),
    ),
    Headline(
        "decode",
        "decoding step, 8 rows, 8 adapters, TinyLlama-1.1B's shape",
        "deltaw",
        "no adapter",
        ("8/8/deltaw", "seconds"),
        ("8/0/base", "seconds"),
    ),
    *(
        Headline(
            "tinyllama",
            f"{what}, TinyLlama-1.1B's shape",
            "PEFT",
            "deltaw",
            ("peft", f"{key}/first"),
            ("deltaw", f"{key}/first"),
        )
        for key, what in (
            ("attach", "attach"),
            ("load", "load"),
            ("swap", "replace by another from disk"),
            ("merge", "merge"),
        )
    ),
    Headline(
        "importing",
        "import after torch",
        "PEFT",
        "deltaw",
        ("peft", "seconds"),
        ("deltaw", "seconds"),
    ),
)


def summary(results: Mapping[str, Results]) -> str:
    """Return the table of all headlines that were measured, or nothing without any."""
    rows = []
    for headline in HEADLINES:
        own = results[headline.benchmark]
        found = rounds.ratios(
            rounds.values(own, *headline.above), rounds.values(own, *headline.below)
        )
        if found:
            rows.append((headline.what, headline.divided, headline.by, spread(found)))
    return table(("measured", "divided", "by", "ratio"), rows) + "\n" if rows else ""
