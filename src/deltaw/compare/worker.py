"""What is done in a process of its own: looking at a method once, and one run.

A fresh process for each run gives it memory of its own, which can be measured, and keeps a crash
to one run.
"""

import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import deltaw
from deltaw.errors import DeltawError, DivergedError, RunError
from deltaw.train.console import Console
from deltaw.train.identity import base_digest, tokenizer_digest
from deltaw.train.interrupt import Interrupt, Stopped
from deltaw.train.model import load_config, load_model, load_tokenizer, quiet
from deltaw.train.prepare import prepare
from deltaw.train.probing import most_memory
from deltaw.train.recipe import parse
from deltaw.train.run import make_progress, train, verify
from deltaw.train.runfolder import LOG, RunFolder, read_recipe, read_results

LESS_MEMORY = "a smaller batch_size, fewer --jobs, or leave this method out."
POINTS = 60
"""Points kept of a curve."""

Values = Mapping[str, Any]


def serve(
    connection: Connection, threads: int, work: Callable[..., dict[str, Any]], *arguments: Any
) -> None:
    """Do `work` in this process and send what came of it: a kind of outcome, and its value."""
    os.setsid()  # a Ctrl-C of the terminal reaches the parent alone, which passes it on once
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        outcome: tuple[str, Any] = ("done", work(*arguments))
    except Stopped:
        outcome = ("stopped", None)
    except DivergedError as error:
        outcome = ("diverged", str(error))
    except DeltawError as error:
        outcome = ("refused", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        outcome = ("refused", f"not enough memory: {error}\nFix: {LESS_MEMORY}")
    except Exception:
        outcome = ("crashed", f"a defect, please report it:\n{traceback.format_exc()}")
    with suppress(BrokenPipeError):  # the parent is gone
        connection.send(outcome)
    connection.close()


def _end_with(sentinel: int) -> None:
    """Stop this process, with a checkpoint, when its parent is gone."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def examine(values: Values) -> dict[str, Any]:
    """Prepare a method as for training and return what is known before the first step."""
    with Interrupt() as interrupt, quiet(), TemporaryDirectory() as scratch:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            console = Console(silent=True)
            job = prepare(parse(values), console)
            trainer = job.trainer(Path(scratch), interrupt, make_progress(job, console))
            verify(job, trainer)
        summary = deltaw.summary(job.model)
        assert job.recipe.record is not None
        return {
            "rate": job.plan.rate.value,
            "steps": job.plan.steps,
            "every": job.plan.every,
            "metric": job.plan.metric,
            "adapted": job.adapted.said,
            "trainable": summary.trainable,
            "parameters": summary.total,
            "base": job.recipe.record["base"],
            "tokenizer": job.recipe.record["tokenizer"],
            "warnings": [*job.warnings, *dict.fromkeys(str(found.message) for found in caught)],
        }


def identify(values: Values) -> dict[str, Any]:
    """Return the digests of the model that a run would begin from."""
    recipe = parse(values)
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    config = load_config(recipe.model, None, **where)
    tokenizer = load_tokenizer(recipe.model, config, **where)
    model, _ = load_model(config, recipe.model, recipe.seed, **where)
    return {"base": base_digest(model), "tokenizer": tokenizer_digest(tokenizer)}


def run(values: Values, scored: tuple[str, ...]) -> dict[str, Any]:
    """Do one run, or what is left of it, and return its scores, costs and curves.

    Its rate is never lowered on the way: one that is too high is to show.
    """
    recipe = parse({"watchdog": False} | values)
    assert recipe.output is not None
    folder = Path(recipe.output)
    before = most_memory()
    finished = RunFolder(folder).finished
    if not finished:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the examination has said them
            train(recipe, silent=True, scored=scored)
    found = read_results(folder)
    if not found:
        raise RunError(f"{folder} holds no results.")
    record = read_recipe(folder).record or {}
    steps = [event for event in _events(folder / LOG) if event["event"] == "step"]
    return {
        "diverged": None,
        "base": record.get("base"),
        "tokenizer": record.get("tokenizer"),
        "validation": found["best_validation"],
        "validation_loss": min(
            (event["eval_loss"] for event in steps if "eval_loss" in event), default=None
        ),
        "test": found["after"],
        "trainable": found["trainable_parameters"],
        "file_bytes": found["weights_bytes"],
        "seconds_per_step": found["seconds_per_step"],
        "peak_bytes": None if finished or found["resumed"] else most_memory() - before,
        "loss": _thinned({e["step"]: e["loss"] for e in steps if "loss" in e}, recipe.max_steps),
    }


def _events(log: Path) -> Iterator[dict[str, Any]]:
    """Yield what a log tells of; a line that was cut short is left out."""
    for line in log.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def _thinned(losses: Mapping[int, float], steps: int | None) -> list[list[float]]:
    """Return means over the last step of at most `POINTS` equal stretches of all steps."""
    width = math.ceil((steps or max(losses, default=1)) / POINTS)
    stretches: dict[int, list[float]] = {}
    for step, loss in sorted(losses.items()):
        stretches.setdefault(math.ceil(step / width) * width, []).append(loss)
    return [[end, round(statistics.fmean(some), 5)] for end, some in stretches.items()]
