"""How processes start where there are GPUs, which one each gets, and that none sees another."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltaw.compare.processes import VISIBLE, Pool, _seeing
from deltaw.train.interrupt import Interrupt


@pytest.fixture
def pool() -> Iterator[Callable[[int], Pool]]:
    """What makes a pool on a machine with so many GPUs."""
    with pytest.MonkeyPatch.context() as patch:

        def made(gpus: int) -> Pool:
            patch.setattr(torch.cuda, "device_count", lambda: gpus)
            return Pool(4, 1, Interrupt())

        yield made


@pytest.mark.parametrize(("gpus", "method"), [(0, "forkserver"), (2, "spawn")])
def test_no_process_is_forked_from_one_that_may_have_touched_a_gpu(
    pool: Callable[[int], Pool], gpus: int, method: str
) -> None:
    assert pool(gpus)._context.get_start_method() == method


def test_the_idlest_gpu_gets_the_next_process(
    pool: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    seen: list[str | None] = []

    def process(**_: Any) -> Any:
        return SimpleNamespace(start=lambda: seen.append(os.environ.get(VISIBLE)))

    three = pool(3)
    monkeypatch.setattr(three._context, "Process", process, raising=False)
    for name in "abcd":
        three.start(name, dict)
    assert seen == ["0", "1", "2", "0"]
    assert [task.gpu for task in three.tasks] == [0, 1, 2, 0]
    three.tasks = [task for task in three.tasks if task.name in "ad"]
    three.start("e", dict)
    assert seen[-1] == "1"
    assert VISIBLE not in os.environ


@pytest.mark.parametrize(
    ("before", "gpu", "seen"),
    [
        (None, 1, "1"),
        ("5,7", 1, "7"),
        ("GPU-a,GPU-b", 0, "GPU-a"),
        ("", None, ""),
        (None, None, None),
    ],
)
def test_a_process_sees_one_of_the_gpus_that_its_parent_sees(
    before: str | None, gpu: int | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VISIBLE, before)
    with pytest.raises(ZeroDivisionError), _seeing(gpu):
        assert os.environ.get(VISIBLE) == seen
        raise ZeroDivisionError
    assert os.environ.get(VISIBLE) == before
