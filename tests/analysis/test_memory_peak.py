"""The estimate against a real run in a process of its own."""

from pathlib import Path

import pytest

CASE = "books-gpt2-7m/lora/2x128"
TRIES = 3
"""Of which the lowest counts: a kernel that reclaims cold pages lowers what a run starts from."""


@pytest.mark.slow
def test_within_the_limit_of_a_measured_peak(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import memory_estimate, rounds

    monkeypatch.setenv("DELTAW_SHARED", str(shared))
    monkeypatch.setattr(memory_estimate, "SHARED", shared)
    peaks = [rounds.in_fresh_process("memory_estimate", CASE)["peak"] for _ in range(TRIES)]
    measured = min(peaks)
    guessed = memory_estimate.guess(CASE)["total"]
    assert abs(guessed / measured - 1) < memory_estimate.LIMIT
