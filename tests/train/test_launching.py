"""Several processes started by one command, and how they share a batch."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import launched

from deltaw.cli import launching
from deltaw.cli.launching import launch, wanted
from deltaw.errors import ConfigError
from deltaw.train.batches import EpochSampler
from deltaw.train.distributed.dividing import divided
from deltaw.train.distributed.shares import WEIGHT, Place, ShareSampler, joined, loader
from deltaw.train.recipe import parse


def order(rows: int, size: int) -> EpochSampler:
    return EpochSampler([1 + n % 4 for n in range(rows)], size, 3, bucketed=True)


def shares(rows: int, size: int, count: int, **more: Any) -> list[list[list[Place]]]:
    """The batches of each process."""
    samplers = [ShareSampler(order(rows, size), rank, count, **more) for rank in range(count)]
    found = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in found] == [len(sampler) for sampler in samplers]
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "size", "join"), [(12, 4, 1), (14, 4, 1), (13, 6, 2), (9, 2, 2)])
def test_every_row_has_its_weight_in_one_process(
    count: int, rows: int, size: int, join: int
) -> None:
    values = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    epoch = list(order(rows, size))
    for equal in (False, True):
        parts = shares(rows, size, count, equal=equal, joined=join)
        for number, together in enumerate(zip(*parts, strict=True)):
            batch = epoch[number * size * join : (number + 1) * size * join]
            each = [values[[p.row for p in share]] * share[0].weight for share in together]
            if equal:  # the mean over processes is that over the rows
                found = torch.stack([part.mean() for part in each]).mean()
                torch.testing.assert_close(found, values[batch].mean())
            else:
                real = [place.row for share in together for place in share if place.weight]
                assert sorted(real) == sorted(batch)
                torch.testing.assert_close(sum(part.sum() for part in each), values[batch].sum())


def test_a_process_without_a_row_takes_part_with_weight_nothing() -> None:
    last = [batches[-1] for batches in shares(13, 4, 3)]
    assert [len(share) for share in last] == [1, 1, 1]
    assert len({share[0].row for share in last}) == 1
    assert [share[0].weight for share in last] == [1, 0, 0]


def test_the_weight_is_part_of_a_batch() -> None:
    sampler = ShareSampler(order(5, 4), 1, 2)
    batches = list(loader(list(range(5)), sampler, lambda rows: {"rows": rows}))
    assert [batch[WEIGHT] for batch in batches] == [1.0, 0.0]
    assert len(batches[0]["rows"]) == 2


@pytest.mark.parametrize(
    ("processes", "rows", "batches", "equal", "expected"),
    [
        (2, 2, 8, False, 1),
        (2, 1, 8, False, 2),
        (3, 1, 8, False, 4),
        (8, 1, 8, False, 8),
        (3, 2, 3, False, 3),
        (9, 1, 8, False, None),
        (2, 1, 8, True, None),
        (2, 3, 8, True, None),
        (2, 4, 8, True, 1),
    ],
)
def test_batches_of_a_step_are_joined_until_each_process_has_a_row(
    processes: int, rows: int, batches: int, equal: bool, expected: int | None
) -> None:
    assert joined(processes, rows, batches, equal=equal) == expected


KILLED = (
    "error: One of the processes was killed (SIGKILL), as the system does where memory runs out; "
    "the others were ended.\nFix: the same command goes on from the last checkpoint; a smaller "
    "batch_size takes less.\n"
)
RECIPE = parse({"model": "m", "data": "d", "task": "sft"})


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (wanted(None, RECIPE), wanted(3, RECIPE)) == (1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (wanted(None, RECIPE), wanted(1, RECIPE), wanted(3, RECIPE)) == (4, 1, 3)
    with pytest.raises(ConfigError, match="--processes 5 needs as many GPUs, and 4 can be seen"):
        wanted(5, RECIPE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wanted(None, RECIPE) == 1
    with pytest.raises(ConfigError, match="one of 2 by WORLD_SIZE"):
        wanted(2, RECIPE)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"task": "kto"}, 1),
        ({"task": "dpo", "batch_size": 6}, 3),
        ({"task": "sft", "batch_size": 3, "gradient_accumulation": 1}, 3),
        ({"task": "sft", "batch_size": 3, "gradient_accumulation": 2}, 4),
        ({"task": "sft", "method": "full", "optim": "galore_adamw_layerwise"}, 1),
    ],
)
def test_as_many_gpus_are_used_as_can_share_the_batches(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    expected: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert wanted(None, parse({"model": "m", "data": "d", **more})) == expected
    said = f"processes {expected} of 4 GPUs can share the batches of this recipe\n"
    assert capsys.readouterr().out == (said if expected < 4 else "")


def test_launched_processes_find_each_other(tmp_path: Path) -> None:
    assert launch(2, launched.note, {"folder": tmp_path}) == 0
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"0": "0 0 2 127.0.0.1", "1": "1 1 2 127.0.0.1"}


def test_work_is_divided_and_each_process_knows_all(tmp_path: Path) -> None:
    assert launch(2, launched.divide, {"folder": tmp_path}) == 0
    squares = [0, 1, 4, 9, 16]
    assert (tmp_path / "0").read_text() == f"[0, 2, 4] {squares}"
    assert (tmp_path / "1").read_text() == f"[1, 3, 4] {squares}"
    assert divided(range(5), lambda number: number**2) == squares


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [(launched.fail, 1, "error: no\n"), (launched.vanish, 137, KILLED), (launched.stop, 130, None)],
)
def test_one_that_fails_ends_all_and_a_signal_reaches_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    target: Callable[..., object],
    code: int,
    said: str | None,
) -> None:
    monkeypatch.setattr(launching, "GRACE", 1)
    assert launch(2, target, {"folder": tmp_path}) == code
    err = capfd.readouterr().err
    assert err == said or sorted(err.splitlines()) == ["0 stopped", "1 stopped"]


def deltaw(*arguments: str) -> subprocess.Popen[str]:
    code = "from deltaw.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_command_trains_in_two_processes_and_is_stopped_and_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(tiny / "model"), str(tiny / "data.csv"), "--output", str(run)]
    command += ["--processes", "2", "max_steps=80", "eval_every=40", "batch_size=4"]
    process = deltaw(*command)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if "Stopped in step" in line] == [
        line for line in err.splitlines() if line.startswith("Stopped")
    ]
    assert "".join([*lines, out]).count("verify    passed") == 1
    assert len(list(run.glob("checkpoint-*"))) == 1
    process = deltaw(*command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resume    an interrupted run goes on from step" in out
    assert json.loads((run / "results.json").read_text())["resumed"] is True
