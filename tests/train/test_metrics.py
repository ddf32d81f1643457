"""Metrics against scikit-learn and scipy, intervals against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from deltaw.errors import DataError
from deltaw.train.metrics import measure, score, wilson

CLASSES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)
# A coarse grid makes ties frequent and keeps the oracle well-conditioned.
VALUES = st.integers(-8, 8).map(lambda value: value / 4)
NUMBERS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=60)


@given(CLASSES)
def test_agreement_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = zip(*pairs, strict=True)
    found = measure("classification", true, predicted)
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(true, predicted), abs=1e-12)
    f1 = oracle.f1_score(true, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-12)
    if len({*true, *predicted}) > 1:
        matthews = oracle.matthews_corrcoef(true, predicted)
        assert found["matthews"] == pytest.approx(matthews, abs=1e-12)
    else:
        assert found["matthews"] == 0


@given(NUMBERS)
def test_correlation_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    true, predicted = zip(*pairs, strict=True)
    found = measure("regression", true, predicted)
    if len(set(true)) == 1 or len(set(predicted)) == 1:
        assert found == {"pearson": 0, "spearman": 0}
        return
    assert found["pearson"] == pytest.approx(stats.pearsonr(true, predicted).statistic, abs=1e-12)
    spearman = stats.spearmanr(true, predicted).statistic
    assert found["spearman"] == pytest.approx(spearman, abs=1e-12)


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 40), (33, 40), (872, 872)])
def test_wilson_solves_its_equation(right: int, rows: int) -> None:
    """The bounds are the shares p whose distance to the observed one is z standard errors of p."""
    z, share = stats.norm.ppf(0.975), right / rows
    for bound in wilson(right, rows):
        distance = (share - bound) ** 2
        assert distance == pytest.approx(z**2 * bound * (1 - bound) / rows, abs=1e-12)
    assert wilson(right, rows) == pytest.approx(
        tuple(stats.binomtest(right, rows).proportion_ci(method="wilson")), abs=1e-12
    )


def test_the_primary_metric_and_its_interval() -> None:
    found = score("classification", [0, 1, 1, 0], [0, 1, 0, 0])
    assert (found.primary, found.value, found.rows) == ("accuracy", 0.75, 4)
    assert found.interval == found.intervals["accuracy"] == wilson(3, 4)
    assert set(found.intervals) == set(found.values) == {"accuracy", "macro_f1", "matthews"}
    assert score("regression", [0.0, 1.0, 2.0], [0.0, 1.0, 3.0]).primary == "pearson"


def test_bootstrap_intervals_agree_with_drawing_rows_one_by_one() -> None:
    """The last class has one row, so that a third of the draws do not have it."""
    generator = np.random.default_rng(1)
    true = np.append(generator.integers(0, 2, size=119), 2)
    predicted = np.append(np.where(generator.random(119) < 0.8, true[:-1], 1 - true[:-1]), 2)
    found = score("classification", true, predicted)
    replicas = []
    for _ in range(600):
        rows = generator.integers(120, size=120)
        f1 = oracle.f1_score(true[rows], predicted[rows], average="macro")
        replicas.append((f1, oracle.matthews_corrcoef(true[rows], predicted[rows])))
    for name, drawn in zip(("macro_f1", "matthews"), np.transpose(replicas), strict=True):
        expected = tuple(np.quantile(drawn, [0.025, 0.975]))
        assert found.intervals[name] == pytest.approx(expected, abs=0.02)


def test_bootstrap_intervals_of_correlations_agree_with_fisher() -> None:
    """For normal data atanh(r) is normal with standard error 1/sqrt(n - 3)."""
    generator = np.random.default_rng(2)
    x = generator.normal(size=2500)
    found = score("regression", x, x + generator.normal(size=2500))
    centre, half = math.atanh(found.value), 1.959964 / math.sqrt(2497)
    expected = (math.tanh(centre - half), math.tanh(centre + half))
    assert found.interval == pytest.approx(expected, abs=0.005)
    low, high = found.intervals["spearman"]
    assert low < found.values["spearman"] < high


def test_intervals_are_seeded() -> None:
    true = [float(n) for n in range(20)]
    predicted = [n + n % 3 for n in true]
    assert score("regression", true, predicted) == score("regression", true, predicted)
    other = score("regression", true, predicted, seed=1)
    assert other.intervals != score("regression", true, predicted).intervals
    assert other.values == score("regression", true, predicted).values


@pytest.mark.parametrize(
    ("labels", "predictions", "problem"),
    [([], [], "shape"), ([1], [1, 2], "shape"), ([1, 2], [math.nan, math.inf], "2 of 2")],
)
def test_what_cannot_be_scored(labels: list[float], predictions: list[float], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        score("regression", labels, predictions)
