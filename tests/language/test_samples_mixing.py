"""The order of a mixture: against `datasets.interleave_datasets`, and by what it promises."""

from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import ConfigError
from deltaw.language.data.mixing import Strategy, check_mix, mix

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def theirs(
    sizes: list[int], strategy: str, probs: list[float] | None, seed: int
) -> list[tuple[int, int]]:
    sets = [
        datasets.Dataset.from_dict({"set": [number] * size, "at": list(range(size))})
        for number, size in enumerate(sizes)
    ]
    mixed = datasets.interleave_datasets(
        sets,
        probabilities=probs,
        seed=seed,
        stopping_strategy=STOPPING[strategy],  # type: ignore[arg-type]
    )
    return list(zip(mixed["set"], mixed["at"], strict=True))


@pytest.mark.parametrize("strategy", STOPPING)
@pytest.mark.parametrize("sizes", [[3, 5], [5, 3], [1, 4, 2], [4, 4], [2]])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_order_of_datasets(strategy: Strategy, sizes: list[int], weighted: bool) -> None:
    probs = (
        [(n + 1) / sum(range(1, len(sizes) + 1)) for n in range(len(sizes))] if weighted else None
    )
    assert mix(sizes, strategy, probs, 7) == theirs(sizes, strategy, probs, 7)


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.sampled_from(["concat", *STOPPING]),
    st.booleans(),
    st.integers(0, 5),
)
def test_what_a_mixture_promises(
    sizes: list[int], strategy: Strategy, weighted: bool, seed: int
) -> None:
    weights = [float(n + 1) for n in range(len(sizes))]
    probs = weights if weighted and strategy != "concat" else None
    picks = mix(sizes, strategy, probs, seed)
    counts = Counter(picks)
    everything = {(source, at) for source, size in enumerate(sizes) for at in range(size)}
    assert set(picks) <= everything
    taken = [[at for source, at in picks if source == n] for n in range(len(sizes))]
    assert all(
        found == [at % size for at in range(len(found))]
        for found, size in zip(taken, sizes, strict=True)
    )
    if strategy in ("concat", "interleave_once"):
        assert set(picks) == everything and len(picks) == len(everything)
    if strategy == "interleave_over":
        assert set(picks) == everything
    if strategy == "interleave_under":
        assert max(counts.values()) == 1
        assert any(len(found) == size for found, size in zip(taken, sizes, strict=True))


def test_weights_are_shares_whatever_their_sum() -> None:
    picks = mix([10_000, 10_000], "interleave_under", [3, 1], 0)
    assert picks == mix([10_000, 10_000], "interleave_under", [0.75, 0.25], 0)
    share = sum(source == 0 for source, _ in picks) / len(picks)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(picks)) ** 0.5


@pytest.mark.parametrize(
    ("strategy", "probs", "problem"),
    [
        ("interleave", None, "mix_strategy is 'interleave', none of concat, interleave_under"),
        ("concat", [1, 1], "interleave_probs are given, and mix_strategy is concat"),
        ("interleave_under", [1], "1 interleave_probs for 2 data sets"),
        ("interleave_over", [1, 0], "interleave_probs must be positive numbers"),
        ("interleave_over", [1, float("nan")], "interleave_probs must be positive numbers"),
    ],
)
def test_bad_mixtures(strategy: str, probs: list[float] | None, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mix(strategy, probs, 2)
    assert problem in str(caught.value) and "\nFix: " in str(caught.value)
