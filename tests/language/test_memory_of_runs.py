"""What is said of a recipe's memory against the real run, in a process of its own."""

from pathlib import Path

import pytest

CASES = ("books-gpt2-7m/lora/4x256", "books-gpt2-7m/galore/4x256")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_within_the_limit_of_a_measured_peak(
    shared: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from benchmarks import memory_estimate, rounds, train_memory

    monkeypatch.setenv("DELTAW_SHARED", str(shared))
    monkeypatch.setattr(memory_estimate, "SHARED", shared)
    measured = rounds.in_fresh_process("train_memory", case)["peak"]
    found = train_memory.guess(case)
    assert abs(found["total"] / measured - 1) < train_memory.LIMIT
    assert measured < found["bound"]
