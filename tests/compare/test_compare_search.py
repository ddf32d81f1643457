"""Successive halving: what is run, what it costs, and which rate is trained with every seed."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.compare.search import DIVERGED, Standing, Trial, count, planned, rungs, standing

SEEDS = [3, 4]


def finish(rates: list[float], score: Callable[[Trial], tuple[float, float]]) -> Standing:
    """Run whatever is due, one trial at a time, until nothing is."""
    scores: dict[Trial, tuple[float, float]] = {}
    while (now := standing("m", rates, SEEDS, scores.get)).due:
        assert now.done == list(scores) or set(now.done) == set(scores)
        scores[now.due[0]] = score(now.due[0])
    return now


@given(st.integers(1, 40))
def test_rounds_halve_the_rates_and_double_the_length(number: int) -> None:
    found = rungs(number)
    assert [many for many, _ in found] == [math.ceil(number / 2**i) for i in range(len(found))]
    assert all(later == 2 * share for (_, share), (_, later) in itertools.pairwise(found))
    if found:
        assert found[0][0] == number and found[-1] == (2, 0.5)
    else:
        assert number == 1


def test_three_rates_cost_less_than_two_full_runs() -> None:
    assert rungs(3) == [(3, 0.25), (2, 0.5)]
    assert planned(3, 5) == 3 / 4 + 2 / 2 + 5 and count(3, 5) == 10


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9, unique=True), st.data())
def test_the_best_rate_wins_whatever_the_order(rates: list[float], data: st.DataObject) -> None:
    best = data.draw(st.sampled_from(rates))
    now = finish(rates, lambda trial: (-abs(math.log(trial.rate / best)), 0.0))
    assert now.final == [Trial("m", best, 1.0, seed) for seed in SEEDS]
    assert len(now.done) == count(len(rates), len(SEEDS)) and len(set(now.done)) == len(now.done)
    assert sum(trial.share for trial in now.done) == planned(len(rates), len(SEEDS))


def test_only_the_first_seed_chooses() -> None:
    now = finish([1e-3, 1e-2, 1e-1], lambda trial: (trial.rate if trial.seed == 3 else 1.0, 0.0))
    assert {trial.seed for trial in now.done if trial.share < 1} == {3}
    assert now.final[0].rate == 1e-1


def test_of_equal_scores_the_lower_loss_goes_on() -> None:
    now = finish([1e-3, 1e-2, 1e-1], lambda trial: (0.5, -abs(trial.rate - 1e-2)))
    assert now.final[0].rate == 1e-2


def test_a_rate_that_diverges_is_left_behind() -> None:
    def score(trial: Trial) -> tuple[float, float]:
        return DIVERGED if trial.rate > 1e-3 else (-1.0, -9.0)

    assert finish([1e-3, 1e-2, 1e-1], score).final[0].rate == 1e-3


def test_nothing_is_left_where_every_rate_diverges() -> None:
    now = finish([1e-3, 1e-2, 1e-1], lambda trial: DIVERGED)
    assert now.due == [] and now.final == []


def test_more_seeds_only_add_runs() -> None:
    scores: dict[Trial, tuple[float, float]] = {}
    for seeds in ([0], [0, 1, 2]):
        while due := standing("m", [1e-3, 1e-2], seeds, scores.get).due:
            before = len(scores)
            scores |= {trial: (trial.rate, 0.0) for trial in due}
            assert len(scores) == before + len(due)
    assert len(scores) == 2 + 3


def test_the_name_of_a_trial_tells_all() -> None:
    keys = {Trial(m, r, s, d).key for m in "ab" for r in (1, 2) for s in (0.5, 1) for d in (0, 1)}
    assert len(keys) == 16


@pytest.mark.parametrize("number", [0, 1])
def test_one_rate_needs_no_search(number: int) -> None:
    assert rungs(number) == []
