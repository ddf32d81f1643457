"""TIES, DARE and pruning against their definitions, written out element by element."""

import math

import pytest
import torch
from combine_states import KINDS, close, delta, layer, shift, state
from torch import Tensor

from deltaw import combine
from deltaw.combine.dropping import drop
from deltaw.state import State


def flat(states: list[State], weights: list[float], density: float) -> list[list[float]]:
    """The weighted ΔW of each adapter as numbers, all but the largest set to 0."""
    trimmed = []
    for each, weight in zip(states, weights, strict=True):
        values = (weight * delta(each.layers["h"])).flatten().tolist()
        order = sorted(range(len(values)), key=lambda n: -abs(values[n]))
        kept = set(order[: max(1, round(density * len(values)))])
        trimmed.append([v if n in kept else 0.0 for n, v in enumerate(values)])
    return trimmed


def elected(columns: list[list[float]], majority: str) -> list[float]:
    made = []
    for votes in zip(*columns, strict=True):
        signs = [math.copysign(1, v) if v else 0 for v in votes]
        sign = 1 if (sum(votes) if majority == "total" else sum(signs)) >= 0 else -1
        agree = [v for v, own in zip(votes, signs, strict=True) if own == sign]
        made.append(sum(agree) / len(agree) if agree else 0.0)
    return made


def three() -> list[State]:
    return [state({"h": layer("linear", r, 0.5 * r, seed=r)}) for r in (2, 3, 4)]


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 1.0])
def test_ties_is_trim_elect_and_mean(density: float, majority: str) -> None:
    states, weights = three(), [1.0, 0.7, -2.0]
    made = combine.ties(states, weights, density=density, majority=majority, rank=6)
    expected = torch.tensor(elected(flat(states, weights, density), majority)).view(6, 7)
    close(delta(made.state.layers["h"]), expected, 1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_pruning_is_the_sum_of_what_trimming_leaves(density: float) -> None:
    states, weights = three(), [1.0, 0.7, -2.0]
    made = combine.prune(states, weights, density=density, energy=1.0)
    expected = torch.tensor(flat(states, weights, density)).sum(0).view(6, 7)
    close(delta(made.state.layers["h"]), expected, 1e-6)


def test_one_adapter_untrimmed_comes_back_from_all() -> None:
    for kind in KINDS:
        task = state({"h": layer(kind, 3, 0.7)})
        for made in (
            combine.ties([task], density=1.0),
            combine.prune([task], density=1.0),
            combine.dare([task], density=1.0),
            combine.dare([task], density=1.0, ties=True),
        ):
            close(delta(made.state.layers["h"]), delta(task.layers["h"]))
            assert all(kept.error < 1e-7 for kept in made.kept)


def test_a_layer_that_some_lack_counts_as_zero_there() -> None:
    a, b = state({"h": layer("linear", 2)}), state({"v": layer("linear", 2)})
    made = combine.ties([a, b], density=1.0).state
    close(delta(made.layers["h"]), delta(a.layers["h"]))
    close(delta(made.layers["v"]), delta(b.layers["v"]))


def test_biases_on_b_are_elements_too() -> None:
    states = [state({"h": layer("linear", 2, 1.5, bias=True, seed=n)}) for n in range(3)]
    made = combine.ties(states, density=1.0).state
    columns = [shift(each.layers["h"]).tolist() for each in states]
    close(shift(made.layers["h"]), torch.tensor(elected(columns, "total")), 1e-6)


def masks(states: list[State], weights: list[float], density: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        drop(weight * delta(each.layers["h"]), density, generator)
        for each, weight in zip(states, weights, strict=True)
    ]


def test_dare_drops_elements_of_delta_w_and_rescales() -> None:
    states, weights = three(), [1.0, 0.7, -2.0]
    thinned = masks(states, weights, 0.4, seed=3)
    for each, weight, own in zip(states, weights, thinned, strict=True):
        scaled = weight * delta(each.layers["h"]) / 0.4
        assert bool(((own == 0) | (own == scaled)).all())
        assert 0.2 < float((own != 0).double().mean()) < 0.6
    made = combine.dare(states, weights, density=0.4, seed=3, rank=6)
    close(delta(made.state.layers["h"]), sum(thinned))
    columns = [own.flatten().tolist() for own in thinned]
    made = combine.dare(states, weights, density=0.4, seed=3, rank=6, ties=True)
    close(delta(made.state.layers["h"]), torch.tensor(elected(columns, "total")).view(6, 7), 1e-6)


def test_dare_keeps_the_expectation() -> None:
    task, generator = torch.ones(300, 300), torch.Generator().manual_seed(0)
    assert float(drop(task, 0.25, generator).mean()) == pytest.approx(1, abs=0.03)


def test_a_seed_gives_one_adapter_and_another_seed_another() -> None:
    states = three()

    def made(seed: int) -> Tensor:
        return delta(combine.dare(states, seed=seed).state.layers["h"])

    before = torch.random.get_rng_state()
    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_default_rank_is_the_highest_of_the_adapters() -> None:
    made = combine.ties(three())
    assert made.state.config.r == 4
    M = delta(combine.ties(three(), rank=6).state.layers["h"])
    sigma = torch.linalg.svdvals(M)
    error = float((delta(made.state.layers["h"]) - M).norm() / M.norm())
    assert made.kept[0].error == pytest.approx(error, rel=1e-6)
    assert error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-6)


@pytest.mark.parametrize("limit", [{"rank": 12}, {"energy": 0.5}])
def test_a_sketch_is_nearly_as_good_as_the_whole_svd(limit: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)

    def wide(r: int) -> State:
        draw = torch.randn(r, 600, generator=generator)
        own = layer("linear", r)
        tensors = {"weight.lora_A": draw, "weight.lora_B": torch.randn(700, r, generator=generator)}
        return state({"h": type(own)("linear", tensors, 0.3)})

    states = [wide(8), wide(6)]
    sketched = combine.ties(states, density=0.5, **limit)
    exact = combine.ties(states, density=0.5, exact=True, **limit)
    assert exact.kept[0].error <= sketched.kept[0].error + 1e-6
    assert sketched.kept[0].error < 1.002 * exact.kept[0].error
    ours = sketched.state.layers["h"].tensors
    assert not torch.equal(ours["weight.lora_A"], exact.state.layers["h"].tensors["weight.lora_A"])
