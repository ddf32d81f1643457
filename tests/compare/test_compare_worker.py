"""What a process of its own sends back: every kind of outcome, and the costs of a run."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.compare import worker
from deltaw.errors import ConfigError, DivergedError
from deltaw.train.interrupt import Stopped
from deltaw.train.recipe import parse
from deltaw.train.runfolder import LOG, RESULTS, RunFolder


def _value() -> dict[str, Any]:
    return {"x": 1}


OUTCOMES = [
    (DivergedError("became nan"), "diverged", "became nan"),
    (ConfigError("no such layer"), "refused", "no such layer"),
    (MemoryError("of all things"), "refused", "not enough memory: of all things"),
    (torch.OutOfMemoryError("GPU full"), "refused", "not enough memory: GPU full"),
    (Stopped(15, "stopped"), "stopped", "None"),
    (ZeroDivisionError("of my own"), "crashed", "ZeroDivisionError: of my own"),
]


@pytest.mark.parametrize(("error", "kind", "said"), OUTCOMES)
def test_every_end_is_told_from_the_others(
    error: Exception, kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Any]:
        raise error

    outcome = served(fail, monkeypatch)
    assert outcome[0] == kind
    assert said in str(outcome[1])


def test_a_value_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(_value, monkeypatch) == ("done", {"x": 1})


def served(work: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    monkeypatch.setattr(worker.os, "setsid", lambda: None)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    worker.serve(theirs, torch.get_num_threads(), work)
    found: tuple[str, Any] = ours.recv()
    return found


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_memory_counts_only_where_a_run_was_done_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, resumed: bool
) -> None:
    values = {"model": "m", "data": "d.csv", "output": str(tmp_path)}
    results = {
        "best_validation": 0.5,
        "before": None,
        "after": None,
        "trainable_parameters": 3,
        "weights_bytes": 12,
        "seconds_per_step": 0.1,
        "resumed": resumed,
    }

    def write() -> None:
        RunFolder(tmp_path).write_recipe(parse(values).model_copy(update={"record": {"base": "b"}}))
        (tmp_path / RESULTS).write_text(json.dumps(results))
        steps = [{"event": "step", "step": n, "loss": 1.0 / n, "eval_loss": n} for n in (1, 2)]
        (tmp_path / LOG).write_text("\n".join(map(json.dumps, steps)) + '\n{"cut sh')

    trained = []
    monkeypatch.setattr(worker, "train", lambda *_, **__: trained.append(1) or write())
    if finished:
        write()
    found = worker.run(values, ())
    assert len(trained) == (not finished)
    assert (found["peak_bytes"] is None) == (finished or resumed)
    assert found["base"] == "b" and found["validation_loss"] == 1
    assert found["loss"] == [[1, 1.0], [2, 0.5]]
