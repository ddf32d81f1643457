"""deltaw and PEFT on a Llama of TinyLlama-1.1B's shape: attach, save, load, switch, merge.

A process goes through all operations on a tiny model first, so that nothing is imported when the
first call on the large one is timed.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rounds, shapes
from benchmarks.contestants import ALPHA, RANK, peft_config
from benchmarks.results import Results
from benchmarks.tables import digits, median, percent, spread, table
from benchmarks.timing import nothing, seconds

TITLE = "Handling adapters, TinyLlama-1.1B's shape, bfloat16"
QUICK = False
CONTESTANTS = ("deltaw", "peft")
TIMES = 3
OPERATIONS = {
    "attach": "attach, all linear layers, r=16",
    "save": "save",
    "load": "load",
    "unchecked": "load, base not compared",
    "swap": "replace by another from disk",
    "switch": "switch between two adapters",
    "merge": "merge",
    "unmerge": "unmerge",
}
PEFTS = {"unchecked": "load"}
"""What of PEFT's is compared, where it has another name; PEFT never compares the base."""


def run(results: Results) -> None:
    """Measure both in every round."""
    rounds.measure(results, CONTESTANTS)


def measure(name: str, shape: str = "tinyllama-1.1b") -> dict[str, float]:
    """Measure one of the two, after a rehearsal on a tiny model."""
    import torch

    torch.set_num_threads(2)
    measured = measure_deltaw if name == "deltaw" else measure_peft
    for model in (shapes.build("tiny"), shapes.build(shape)):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(model, folder)
    return found


def timed(
    key: str, action: Callable[[], object], undo: Callable[[], object] = nothing
) -> dict[str, float]:
    """Return the seconds of the first call and of the fastest later one."""
    first, *later = seconds(action, TIMES, undo)
    return {f"{key}/first": first, f"{key}/later": min(later)}


def merging(
    model: Any, merge: Callable[[], object], unmerge: Callable[[], object]
) -> dict[str, float]:
    """Time merging and unmerging, and count the base weights whose bits the first cycle changed."""
    import torch

    base = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and "lora_" not in name
    }
    first = seconds(merge, 1) + seconds(unmerge, 1)
    changed = sum(
        int((now.view(torch.int16) != before.view(torch.int16)).sum())
        for now, before in base.values()
    )
    adapted = sum(before.numel() for name, (_, before) in base.items() if "_proj" in name)
    del base
    later = [seconds(merge, 1) + seconds(unmerge, 1) for _ in range(TIMES - 1)]
    return {
        "merge/first": first[0],
        "unmerge/first": first[1],
        "merge/later": min(pair[0] for pair in later),
        "unmerge/later": min(pair[1] for pair in later),
        "changed": changed / adapted,
    }


def measure_deltaw(model: Any, folder: str) -> dict[str, float]:
    """Measure deltaw."""
    import deltaw

    config = deltaw.LoraConfig(r=RANK, lora_alpha=ALPHA)

    def load(check: bool) -> None:
        deltaw.load(model, folder, "b", check_base=check)

    def detach() -> None:
        deltaw.detach(model, "b")

    found = timed("attach", lambda: deltaw.attach(model, config, "a"), lambda: deltaw.detach(model))
    shapes.randomise(model)
    found |= timed("save", lambda: deltaw.save(model, folder, "a"))
    found |= timed("load", lambda: load(True), detach)
    detach()
    found |= timed("unchecked", lambda: load(False), detach)
    found |= timed("swap", lambda: deltaw.load(model, folder, "b", swap=True))
    found |= timed(
        "switch", lambda: deltaw.activate(model, "b"), lambda: deltaw.activate(model, "a")
    )
    deltaw.activate(model, "a")
    found |= merging(model, lambda: deltaw.merge(model), lambda: deltaw.unmerge(model))
    return found | {"file": (Path(folder) / "adapter_model.safetensors").stat().st_size}


def measure_peft(model: Any, folder: str) -> dict[str, float]:
    """Measure PEFT with the same layers and scale."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    wrapped: list[Any] = []

    def attach() -> None:
        wrapped.append(peft.get_peft_model(model, peft_config()))

    found = timed("attach", attach, lambda: wrapped.pop().unload())
    tuned = wrapped[0]
    shapes.randomise(tuned)
    found |= timed("save", lambda: tuned.save_pretrained(folder))
    found |= timed(
        "load", lambda: tuned.load_adapter(folder, "b"), lambda: tuned.delete_adapter("b")
    )
    found |= timed("swap", lambda: hotswap_adapter(tuned, folder, "default", torch_device="cpu"))
    found |= timed("switch", lambda: tuned.set_adapter("b"), lambda: tuned.set_adapter("default"))
    tuned.set_adapter("default")
    found |= merging(tuned, lambda: tuned.merge_adapter(["default"]), tuned.unmerge_adapter)
    return found | {"file": (Path(folder) / "adapter_model.safetensors").stat().st_size}


def report(results: Results) -> str:
    """Return the table of seconds and of ratios, and how merging leaves the weights."""
    ours, theirs = (
        {
            f"{key}/{call}": rounds.values(results, name, f"{other.get(key, key)}/{call}")
            for key in OPERATIONS
            for call in ("first", "later")
        }
        for name, other in (("deltaw", {}), ("peft", PEFTS))
    )
    rows = [
        (
            title,
            median(ours[f"{key}/first"].values(), 1e3),
            median(theirs[f"{key}/first"].values(), 1e3),
            spread(rounds.ratios(theirs[f"{key}/first"], ours[f"{key}/first"])),
            median(ours[f"{key}/later"].values(), 1e3),
            median(theirs[f"{key}/later"].values(), 1e3),
            spread(rounds.ratios(theirs[f"{key}/later"], ours[f"{key}/later"])),
        )
        for key, title in OPERATIONS.items()
    ]
    changed = {name: rounds.values(results, name, "changed").values() for name in CONTESTANTS}
    size = max(rounds.values(results, "deltaw", "file").values(), default=0)
    header = (
        "",
        "deltaw, first call, ms",
        "PEFT, first call, ms",
        "PEFT / deltaw, first call",
        "deltaw, later, ms",
        "PEFT, later, ms",
        "PEFT / deltaw, later",
    )
    return (
        "Hidden 2048, ffn 5632, 22 layers, 32 / 4 heads, vocabulary 32000; random weights, a file "
        f"of {digits(size / 1e6)} MB. Everything is imported before. The first call of a process, "
        f"and the fastest of {TIMES - 1} later ones; medians of {rounds.done(results)} interleaved "
        "rounds, ratios within a round.\n\n"
        + table(header, rows)
        + "\n\nShare of the adapted weights whose bits differ after merging and unmerging once: "
        f"deltaw {percent(changed['deltaw'])}, PEFT {percent(changed['peft'])}."
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
