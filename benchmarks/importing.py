"""How long it takes to import deltaw and PEFT where torch is imported already."""

import importlib
import json
import sys

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import seconds

TITLE = "Import time"
QUICK = False
CONTESTANTS = {
    "torch": "`import torch`",
    "deltaw": "`import deltaw` after torch, every public name used",
    "peft": "`import peft` after torch",
}


def run(results: Results) -> None:
    """Import each in a fresh process per round."""
    rounds.measure(results, tuple(CONTESTANTS))


def measure(name: str) -> dict[str, float]:
    """Return the seconds of one import; all but torch's begin with torch imported."""
    if name != "torch":
        importlib.import_module("torch")
    return {"seconds": seconds(lambda: everything(name), 1)[0]}


def everything(package: str) -> None:
    """Import a package and all its public names, which deltaw imports when they are used."""
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)


def report(results: Results) -> str:
    """Return the table of seconds and of ratios to deltaw."""
    known = {name: rounds.values(results, name, "seconds") for name in CONTESTANTS}
    rows = [
        (
            title,
            median(known[name].values(), 1e3),
            spread(rounds.ratios(known[name], known["deltaw"])),
        )
        for name, title in CONTESTANTS.items()
    ]
    return (
        "PEFT imports transformers and accelerate, which many scripts import anyway. "
        f"A fresh process each, medians of {rounds.done(results)} interleaved rounds with the "
        "files in the cache of the system; ratios within a round.\n\n"
        + table(("", "ms", "time / deltaw's"), rows)
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
