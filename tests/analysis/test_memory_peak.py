"""The estimate against real runs, each in a process of its own, on shapes that fitted nothing."""

from pathlib import Path

import pytest

from deltaw.analysis.memory.peak import NODES, SAVED
from deltaw.analysis.memory.runs import RUNTIME

GPT2 = "books-gpt2-7m"
CASES = (
    *(f"{GPT2}/{method}/2x128" for method in ("full", "lora", "galore")),
    *(f"tinyllama-4/{method}/1x128" for method in ("full", "lora", "qlora", "galore")),
)
"""QLoRA packs none of a GPT-2's layers, which are Conv1D."""
TRIES = 3
"""Of which the lowest counts: beside other work a kernel reclaims cold pages, and then a run starts
from less than the imported process."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_within_the_limit_of_a_measured_peak(
    case: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import memory_estimate, rounds

    if "qlora" in case:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("DELTAW_SHARED", str(shared))
    monkeypatch.setattr(memory_estimate, "SHARED", shared)
    guessed = memory_estimate.guess(case)["total"]
    measured, error = float("inf"), 1.0
    for _ in range(TRIES):
        measured = min(measured, rounds.in_fresh_process("memory_estimate", case)["peak"])
        error = abs(guessed / measured - 1)
        if error < memory_estimate.LIMIT:
            return
    raise AssertionError(f"{case}: estimated {guessed}, measured {measured}, {error:.1%} apart")


def test_what_is_checked_has_fitted_nothing() -> None:
    from benchmarks import memory_estimate

    assert memory_estimate.FITTED == ("llama-88m", "smollm2-135m")
    shapes = {case.split("/")[0] for case in CASES}
    assert not shapes & set(memory_estimate.FITTED)


def test_the_constants_are_those_of_the_fit() -> None:
    from benchmarks import memory_fit
    from benchmarks.results import Results

    assert memory_fit.FITTED == ("llama-88m", "smollm2-135m")
    (_, nodes, saved, runtime), *others = memory_fit.ranked(Results("memory_fit"))
    assert len(others) + 1 == len(memory_fit.NODES) * len(memory_fit.SAVED)
    assert (nodes, saved, runtime << 20) == (NODES, SAVED, RUNTIME)
