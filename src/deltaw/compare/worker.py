"""What is done in a process of its own: looking at a method once, and one run.

A fresh process for each run gives it memory of its own, which can be measured, and keeps a crash
to one run.
"""

import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import deltaw
from deltaw.errors import DeltawError, DivergedError, RunError
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt, Stopped
from deltaw.train.model import quiet
from deltaw.train.prepare import prepare
from deltaw.train.recipe import parse
from deltaw.train.run import make_progress, make_trainer, train, verify
from deltaw.train.runfolder import LOG, RunFolder, read_recipe, read_results

POINTS = 60
"""Points kept of a curve."""

Values = Mapping[str, Any]


def serve(
    connection: Connection, threads: int, work: Callable[..., dict[str, Any]], *arguments: Any
) -> None:
    """Do `work` in this process and send what came of it: a kind of outcome, and its value."""
    os.setsid()  # a Ctrl-C of the terminal reaches the parent alone, which passes it on once
    torch.set_num_threads(threads)
    try:
        outcome: tuple[str, Any] = ("done", work(*arguments))
    except Stopped:
        outcome = ("stopped", None)
    except DivergedError as error:
        outcome = ("diverged", str(error))
    except DeltawError as error:
        outcome = ("refused", str(error))
    except BaseException:
        outcome = ("crashed", traceback.format_exc())
    connection.send(outcome)
    connection.close()


def examine(values: Values) -> dict[str, Any]:
    """Prepare a method as for training and return what is known before the first step."""
    with Interrupt() as interrupt, quiet(), TemporaryDirectory() as scratch:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            console = Console(silent=True)
            job = prepare(parse(values), console)
            trainer = make_trainer(job, Path(scratch), interrupt, make_progress(job, console))
            verify(trainer)
        summary = deltaw.summary(job.model)
        assert job.recipe.record is not None
        return {
            "rate": job.rate.value,
            "origin": job.rate.origin,
            "steps": job.steps,
            "every": job.every,
            "metric": job.metric,
            "adapted": job.adapted,
            "trainable": summary.trainable,
            "parameters": summary.total,
            "base": job.recipe.record["base"],
            "warnings": [*job.warnings, *dict.fromkeys(str(found.message) for found in caught)],
        }


def run(values: Values, scored: tuple[str, ...]) -> dict[str, Any]:
    """Do one run, or what is left of it, and return its scores, costs and curves."""
    recipe = parse(values)
    assert recipe.output is not None
    folder = Path(recipe.output)
    before = _most_memory()
    if not RunFolder(folder).finished:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the examination has said them
            train(recipe, silent=True, scored=scored)
    found = read_results(folder)
    if not found:
        raise RunError(f"{folder} holds no results.")
    events = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return {
        "diverged": None,
        "base": (read_recipe(folder).record or {}).get("base"),
        "validation": found["best_validation"],
        "validation_loss": min(
            (event["eval_loss"] for event in steps if "eval_loss" in event), default=None
        ),
        "test": found["after"],
        "trainable": found["trainable_parameters"],
        "file_bytes": found["weights_bytes"],
        "seconds": found["seconds"],
        "seconds_per_step": found["seconds_per_step"],
        "peak_bytes": None if found["resumed"] else _most_memory() - before,
        "loss": _thinned([[event["step"], event["loss"]] for event in steps if "loss" in event]),
        "scores": _scores(steps, recipe.metric),
    }


def _scores(steps: list[dict[str, Any]], metric: str | None) -> list[list[float]]:
    name = f"eval_{metric}"
    return [[event["step"], event[name]] for event in steps if name in event]


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most `POINTS` means of equally many neighbours each."""
    width = -(-len(points) // POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [
        [group[-1][0], round(sum(value for _, value in group) / len(group), 5)] for group in groups
    ]


def _most_memory() -> int:
    """Return the most bytes that this process has held so far, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
