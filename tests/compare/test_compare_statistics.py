"""Means, ties and the paired test, against scipy's own and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from deltaw.compare.statistics import Difference, holm, mean, paired, proven


def test_mean_and_standard_error() -> None:
    found = mean([0.1, 0.2, 0.6])
    assert found.value == pytest.approx(0.3) and found.count == 3
    assert found.error == pytest.approx(stats.sem([0.1, 0.2, 0.6]))
    assert mean([0.5]).error is None


def test_the_paired_test_is_scipys() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=7), draw.normal(size=7) + 0.5
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-12)
    assert found.mean == pytest.approx((a - b).mean())
    assert found.error == pytest.approx(stats.sem(a - b))


def test_seeds_are_paired_by_their_number() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {2: 8.0, 1: 1.5, 5: 0.0})
    assert found is not None and found.mean == pytest.approx((0.5 + 1.0) / 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_difference_that_never_varies() -> None:
    same = paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same == Difference(0.0, 0.0, 1.0) and same.is_tie
    other = paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert other == Difference(0.25, 0.0, 0.5) and not other.is_tie
    assert proven({"a": {0: 0.90, 1: 0.92}, "b": {0: 0.88, 1: 0.90}}) == []
    many = {seed: 0.5 + seed / 16 for seed in range(8)}
    found = paired(many, {seed: score - 0.125 for seed, score in many.items()})
    assert found is not None and found.p == pytest.approx(stats.binomtest(8, 8).pvalue)


def test_one_seed_proves_nothing() -> None:
    found = paired({0: 0.9}, {0: 0.1})
    assert found == Difference(pytest.approx(0.8), None, None) and not found.is_tie
    assert proven({"a": {0: 0.9}, "b": {0: 0.1}}) == []


@pytest.mark.parametrize(("factor", "tie"), [(1.99, True), (2.01, False)])
def test_a_tie_lies_within_two_standard_errors(factor: float, tie: bool) -> None:
    assert Difference(-factor * 0.1, 0.1, 0.04).is_tie == tie


def test_holm_by_hand() -> None:
    found = holm({("a", "b"): 0.025, ("a", "c"): 0.01, ("b", "c"): 0.02, ("a", "d"): 0.9})
    expected = {("a", "c"): 0.04, ("b", "c"): 0.06, ("a", "b"): 0.06, ("a", "d"): 0.9}
    assert found == pytest.approx(expected)


def test_what_is_proven_names_the_better_one_first() -> None:
    good = {seed: 0.9 + 0.001 * seed for seed in range(5)}
    bad = {seed: 0.5 + 0.0012 * seed for seed in range(5)}
    like = {seed: good[seed] + (-1) ** seed * 0.01 for seed in range(5)}
    found = proven({"bad": bad, "good": good, "like": like})
    assert {(better, worse) for better, worse, _ in found} == {("good", "bad"), ("like", "bad")}
    assert all(0 <= p < 0.05 for _, _, p in found)


def test_noise_is_seldom_called_proof() -> None:
    draw = np.random.default_rng(1)
    false = 0
    for _ in range(200):
        scores = {name: dict(enumerate(draw.normal(size=5))) for name in "abcd"}
        false += bool(proven(scores))
    assert false / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
