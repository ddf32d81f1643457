"""LoRA against full fine-tuning and a new head alone, on three public data sets.

MiniLM on SST-2, Snips and BANKING77. For each method the learning rate is chosen on a validation
part by successive halving: three rates for half the epochs with seed 0, the better two for all of
them. Then three seeds at the best rate are scored on the test part. Reads the data beside the
checkout (`DELTAW_SHARED`); every run that is done is kept, so an interrupted benchmark goes on.
"""

import csv
import os
import random
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.results import Results

TITLE = "LoRA and full fine-tuning on three classification tasks"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
WORK = Path(__file__).parent / ".work"
SEEDS = (0, 1, 2)
T_95 = 4.303
"""Two-sided 95% point of Student's t with two degrees of freedom, for three paired seeds."""


@dataclass(frozen=True)
class Task:
    """Where a data set lies, its text and label columns, and how much of it is used."""

    train: str
    test: str
    text: str
    label: str
    rows: int
    epochs: int


@dataclass(frozen=True)
class Method:
    """What is trained, and the three learning rates tried, lowest first."""

    title: str
    settings: dict[str, Any]
    rates: tuple[float, float, float]


TASKS = {
    "sst2": Task("sst2/train.tsv", "sst2/dev.tsv", "sentence", "label", 5000, 3),
    "snips": Task("snips_nlu/train.tsv", "snips_nlu/test.tsv", "text", "label", 3000, 3),
    "banking77": Task("banking77/train.csv", "banking77/test.csv", "text", "category", 3000, 8),
}
VALIDATION_ROWS = 600
CLASSIFIER = {"modules_to_save": ["classifier"]}
METHODS = {
    "full": Method("full fine-tuning", {"method": "full"}, (5e-5, 1.5e-4, 4.5e-4)),
    "lora_all": Method(
        "LoRA, all linear, r=8", {"method": "lora", **CLASSIFIER}, (5e-4, 1.5e-3, 4.5e-3)
    ),
    "lora_pooler": Method(
        "LoRA, all linear, r=8, and the pooler in full",
        {"method": "lora"},
        (5e-4, 1.5e-3, 4.5e-3),
    ),
    "lora_qv": Method(
        "LoRA, query and value, r=8",
        {"method": "lora", "target_modules": ["query", "value"], **CLASSIFIER},
        (5e-4, 1.5e-3, 4.5e-3),
    ),
    "head": Method("classifier alone", {"method": "head", **CLASSIFIER}, (1e-3, 5e-3, 2.5e-2)),
}


def run(results: Results) -> None:
    """Do every run that is not done yet."""
    for name, task in TASKS.items():
        data = prepare(name, task)
        for key, method in METHODS.items():
            for rate, epochs, seed in schedule(results, name, key, task, method):
                entry = train(data, task, method, rate, epochs, seed)
                results.add(run_key(name, key, rate, epochs, seed), entry)
                print(
                    f"{name} {key} lr={rate:g} epochs={epochs:g} seed={seed}: {entry}", flush=True
                )


def schedule(
    results: Results, name: str, key: str, task: Task, method: Method
) -> Iterator[tuple[float, float, int]]:
    """Yield (rate, epochs, seed) of the runs to do, each once its choice is known."""

    def todo(rate: float, epochs: float, seed: int) -> Iterator[tuple[float, float, int]]:
        if run_key(name, key, rate, epochs, seed) not in results.entries:
            yield rate, epochs, seed

    for rate in method.rates:
        yield from todo(rate, task.epochs / 2, 0)
    for rate in survivors(results, name, key, task, method):
        yield from todo(rate, task.epochs, 0)
    best = best_rate(results, name, key, task, method)
    for seed in SEEDS:
        yield from todo(best, task.epochs, seed)


def survivors(results: Results, name: str, key: str, task: Task, method: Method) -> list[float]:
    """Return the better two rates after half the epochs."""

    def score(rate: float) -> float:
        entry = results.entries[run_key(name, key, rate, task.epochs / 2, 0)]
        return float(entry["validation"])

    return sorted(method.rates, key=score)[1:]


def best_rate(results: Results, name: str, key: str, task: Task, method: Method) -> float:
    """Return the better of the survivors after all epochs."""

    def score(rate: float) -> float:
        return float(results.entries[run_key(name, key, rate, task.epochs, 0)]["validation"])

    return max(survivors(results, name, key, task, method), key=score)


def run_key(name: str, method: str, rate: float, epochs: float, seed: int) -> str:
    """Return the key of one run among the results."""
    return f"{name}/{method}/lr={rate:g}/epochs={epochs:g}/seed={seed}"


def prepare(name: str, task: Task) -> Path:
    """Write train, validation and test parts of fixed rows, no test text in the others."""
    folder = WORK / name
    if folder.exists():
        return folder
    test = read(SHARED / "data" / task.test, task)
    seen = {text.strip() for text, _ in test}
    pool = list(dict.fromkeys(read(SHARED / "data" / task.train, task)))
    pool = [row for row in pool if row[0].strip() not in seen]
    labels: dict[str, str] = {}
    pool = [row for row in pool if labels.setdefault(row[0].strip(), row[1]) == row[1]]
    random.Random(0).shuffle(pool)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    cut = task.rows + VALIDATION_ROWS
    parts = {"train": pool[: task.rows], "validation": pool[task.rows : cut], "test": test}
    for part, rows in parts.items():
        with (partial / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    partial.rename(folder)
    return folder


def read(path: Path, task: Task) -> list[tuple[str, str]]:
    """Return the (text, label) rows of a file of the shared data."""
    tabs = path.suffix == ".tsv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(
            file,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        )
        return [(row[task.text], row[task.label]) for row in rows]


def train(
    data: Path, task: Task, method: Method, rate: float, epochs: float, seed: int
) -> dict[str, Any]:
    """Do one run through the same code as `deltaw train` and return its scores."""
    from deltaw.demo.run import model_folder
    from deltaw.train.recipe import parse
    from deltaw.train.run import train as run_recipe
    from deltaw.train.runfolder import read_results

    steps = task.rows // 16
    recipe = parse(
        {
            "model": str(model_folder()),
            "data": str(data),
            "output": str(WORK / "run"),
            "allow_leakage": True,
            "learning_rate": rate,
            "epochs": epochs,
            "seed": seed,
            "eval_every": steps if epochs == task.epochs else steps // 2,
            **method.settings,
        }
    )
    folder = run_recipe(recipe, overwrite=True, silent=True)
    found = read_results(folder)
    shutil.rmtree(folder)
    return {
        "validation": found["best_validation"],
        "test": found["after"]["values"],
        "test_rows": found["after"]["rows"],
        "trainable": found["trainable_parameters"],
        "parameters": found["parameters"],
        "file_bytes": found["weights_bytes"],
        "model_bytes": found["model_bytes"],
        "seconds": found["seconds"],
    }


def report(results: Results) -> str:
    """Return the tables of all tasks that are complete."""
    text = [
        "MiniLM (all-MiniLM-L6-v2, 22.7 M parameters), batch 16, float32. The learning rate of "
        "each method is the best of three by successive halving on 600 validation rows; test "
        "accuracy is the mean of three seeds at that rate ± standard error. The last column is "
        "the mean difference to full fine-tuning of the same seed in points, with the 95% interval "
        "of a paired t-test over three seeds, which is wide: differences inside it are noise. LoRA "
        "falls short only where the whole interval lies more than one point below. The pooler of "
        "this model was never trained; deltaw's own choice is to train it in full with the head, "
        "which the row that says so does. The others leave it to the method. Where the rate chosen "
        "is the lowest or the highest of its three, a better one may lie beyond.",
    ]
    for name, task in TASKS.items():
        rows = [line for key in METHODS if (line := _row(results, name, key, task)) is not None]
        if rows:
            tested = next(iter(_final(results, name, "full", task) or []), {"test_rows": "?"})
            text += [
                f"\n### {name}: {task.rows:,} training rows, {task.epochs} epochs, "
                f"{tested['test_rows']} test rows\n",
                "| method | rate | accuracy | trained | file | against full, points |",
                "|---|---|---|---|---|---|",
                *rows,
            ]
    return "\n".join(text)


def _final(results: Results, name: str, key: str, task: Task) -> list[dict[str, Any]] | None:
    """Return the entries of the three seeds at the best rate, or None where some are missing."""
    try:
        rate = best_rate(results, name, key, task, METHODS[key])
        return [results.entries[run_key(name, key, rate, task.epochs, s)] for s in SEEDS]
    except KeyError:
        return None


def _row(results: Results, name: str, key: str, task: Task) -> str | None:
    entries = _final(results, name, key, task)
    if entries is None:
        return None
    rate = best_rate(results, name, key, task, METHODS[key])
    scores = [100 * entry["test"]["accuracy"] for entry in entries]
    first = entries[0]
    full = _final(results, name, "full", task)
    error = statistics.stdev(scores) / sqrt(len(scores))
    share = 100 * first["trainable"] / first["parameters"]
    smaller = (full or entries)[0]["model_bytes"] / first["file_bytes"]
    size = f"{first['file_bytes'] / 1e6:.2f} MB" + (f", 1/{smaller:.0f}" if smaller > 2 else "")
    return (
        f"| {METHODS[key].title} | {rate:g} | {statistics.mean(scores):.2f} ± {error:.2f} "
        f"| {first['trainable']:,} ({share:.2f}%) | {size} "
        f"| {_paired(results, name, key, task, scores)} |"
    )


def _paired(results: Results, name: str, key: str, task: Task, scores: list[float]) -> str:
    full = _final(results, name, "full", task)
    if key == "full" or full is None:
        return ""
    differences = [a - 100 * b["test"]["accuracy"] for a, b in zip(scores, full, strict=True)]
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / sqrt(len(differences))
    verdict = ", falls short" if mean + half < -1 else ""
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}){verdict}"
