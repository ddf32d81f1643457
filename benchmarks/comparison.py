"""Thirteen methods on four tasks with `deltaw compare`: a rate for each, then five seeds.

MiniLM on SST-2, CoLA, BANKING77 and RTE. Reads the data beside the checkout (`DELTAW_SHARED`).
Every run that is done is kept in `benchmarks/results/comparison/`, so an interrupted benchmark
goes on; table and report of a task are written there when it is complete.
"""

import csv
import os
import random
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import tables
from benchmarks.results import FOLDER, Results, machine

if TYPE_CHECKING:
    from deltaw.compare.summary import Summary

TITLE = "Methods compared on four tasks"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
WORK = Path(__file__).parent / ".work" / "comparison"
KEPT = FOLDER / "comparison"
SEEDS = 5
JOBS = 2

METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"method": "full"},
    "LoRA q,v r=8": {"target_modules": ["query", "value"]},
    "LoRA r=8": {},
    "rsLoRA r=64": {"use_rslora": True, "r": 64, "lora_alpha": 16},
    "LoRA+ r=8": {"loraplus_lr_ratio": 16.0},
    "DoRA r=8": {"use_dora": True},
    "PiSSA r=8": {"init_lora_weights": "pissa"},
    "MiLoRA r=8": {"init_lora_weights": "milora"},
    "EVA r=8": {"init_lora_weights": "eva"},
    "LoRA-GA r=8": {"init_lora_weights": "lora_ga"},
    "QLoRA nf4 r=8": {"quantization_bit": 4},
    "GaLore r=64": {"method": "full", "optim": "galore_adamw", "galore_rank": 64},
    "BitFit": {"method": "bitfit"},
}


@dataclass(frozen=True)
class Task:
    """Where a data set lies, its columns, how much of it is used, and how it is trained on.

    `evaluations` are on the validation part in the course of a run, of which the best state counts.
    """

    train: str
    test: str
    columns: tuple[str, ...]
    label: str
    rows: int | None
    validation: int
    evaluations: int
    recipe: dict[str, Any]


COLA = ("source", "label", "mark", "text")
"""The columns of CoLA's files, which name none."""
TASKS = {
    "sst2": Task(
        "sst2/train.tsv", "sst2/dev.tsv", ("sentence",), "label", 2000, 500, 4, {"epochs": 2}
    ),
    "cola": Task(
        "glue_cola/train.tsv",
        "glue_cola/dev.tsv",
        ("text",),
        "label",
        2000,
        500,
        2,
        {"epochs": 3, "metric": "matthews"},
    ),
    "banking77": Task(
        "banking77/train.csv",
        "banking77/test.csv",
        ("text",),
        "category",
        2000,
        500,
        2,
        {"epochs": 4},
    ),
    "rte": Task(
        "glue_rte/train.tsv",
        "glue_rte/dev.tsv",
        ("sentence1", "sentence2"),
        "label",
        None,
        300,
        2,
        {"epochs": 2, "max_length": 64},
    ),
}


def run(results: Results) -> None:
    """Do every run that is not done yet, task by task."""
    from deltaw.compare.comparing import compare
    from deltaw.demo.run import model_folder

    for name, task in TASKS.items():
        values = {
            "model": str(model_folder()),
            "data": str(prepare(name, task)),
            "eval_every": evaluations(task),
            **task.recipe,
        }
        compare(values, METHODS, seeds=SEEDS, output=KEPT / name, jobs=JOBS)
        results.add(name, {"cpu": machine()["cpu"]})


def evaluations(task: Task) -> int:
    """Return the steps between evaluations."""
    return round(task.recipe["epochs"] * (task.rows or 2190) / 16 / task.evaluations)


def prepare(name: str, task: Task) -> Path:
    """Write train, validation and test parts of fixed rows, no test text in the others."""
    folder = WORK / name
    if folder.exists():
        return folder
    test = read(SHARED / "data" / task.test, task)
    seen = {row[:-1] for row in test}
    labels: dict[tuple[str, ...], str] = {}
    for row in read(SHARED / "data" / task.train, task):
        if row[:-1] not in seen:
            labels.setdefault(row[:-1], row[-1])
    pool = [(*texts, label) for texts, label in labels.items()]
    random.Random(0).shuffle(pool)
    end = None if task.rows is None else task.validation + task.rows
    parts = {
        "validation": pool[: task.validation],
        "train": pool[task.validation : end],
        "test": test,
    }
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, rows in parts.items():
        with (partial / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([(*task.columns, task.label), *rows])
    partial.rename(folder)
    return folder


def read(path: Path, task: Task) -> list[tuple[str, ...]]:
    """Return the texts and, last, the label of every row of a file of the shared data."""
    tabs = path.suffix == ".tsv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(
            file,
            fieldnames=COLA if "cola" in task.train else None,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        )
        return [
            (*(row[column].strip() for column in task.columns), row[task.label]) for row in rows
        ]


def report(results: Results) -> str:
    """Return one table of all tasks that are complete, and the table of each."""
    from deltaw.compare import record, table
    from deltaw.compare.summary import summarize

    found = {}
    for name in TASKS:
        known = record.read(KEPT / name)
        if known is not None and name in results.entries:
            found[name] = summarize(known)
    parts = [
        "MiniLM (all-MiniLM-L6-v2, 22.7 M parameters) in float32, batch 16, with `deltaw compare`: "
        "three rates for each method by successive halving on a validation part with one seed, "
        "five seeds at the best, one split; scores are in hundredths, ± their standard error, with "
        "a star where the difference to the best of the task is a tie. The mean rank counts ties "
        "as if they were differences, also on a task that teaches nothing. All linear layers are "
        "adapted where no other is named; the head and the pooler, which nobody has trained in "
        "this model, are trained in full by every method. Two runs shared the machine with other "
        "work, so seconds are for a rough order only.",
        _overview(found),
    ]
    for name, summary in found.items():
        recipe = ", ".join(f"{key} {value:g}" for key, value in _numbers(TASKS[name]))
        rows = "all" if TASKS[name].rows is None else f"{TASKS[name].rows:,}"
        parts += [
            f"### {name}: {rows} training rows, {recipe}",
            table.write(summary, None),
        ]
    return "\n\n".join(parts)


def _numbers(task: Task) -> list[tuple[str, float]]:
    return [(key, value) for key, value in task.recipe.items() if not isinstance(value, str)]


def _overview(found: "Mapping[str, Summary]") -> str:
    """Return the scores of every method on every task, in the order of their mean rank."""
    cells: dict[str, dict[str, str]] = {title: {} for title in METHODS}
    places: dict[str, list[int]] = {title: [] for title in METHODS}
    for name, summary in found.items():
        for row in summary.rows:
            place = 1 + sum(other.score.value > row.score.value for other in summary.rows)
            best = row.is_best or bool(row.is_tie)
            error = "" if row.score.error is None else f" ± {100 * row.score.error:.2f}"
            cells[row.title][name] = f"{100 * row.score.value:.2f}{error}{' *' if best else ''}"
            places[row.title].append(place)
    order = sorted(METHODS, key=lambda title: statistics.fmean(places[title] or [99]))
    rows = [
        (
            title,
            *(cells[title].get(name, "diverged") for name in found),
            f"{statistics.fmean(places[title]):.1f}" if places[title] else "",
        )
        for title in order
    ]
    headings = [f"{name}, {summary.metric}" for name, summary in found.items()]
    return tables.table(("method", *headings, "mean rank"), rows)
