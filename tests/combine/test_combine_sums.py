"""Sums are Σ wᵢ ΔWᵢ exactly, whatever the layers, ranks, scales and biases."""

import pytest
import torch
from combine_states import KINDS, close, delta, layer, several, shift, state, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltaw
from deltaw import combine
from deltaw.state import State

Drawn = tuple[list[State], list[float]]


def same(made: State, states: list[State], weights: list[float], tolerance: float = 1e-12) -> None:
    """Assert that `made` is the weighted sum, with alpha = r in all of its layers."""
    paths = {path for each in states for path in each.layers}
    assert list(made.layers) == sorted(paths)
    for path, own in made.layers.items():
        assert own.scale == 1
        close(delta(own), weighted(states, weights, path), tolerance)
        close(shift(own), weighted(states, weights, path, shift), tolerance)
    assert not made.config.use_rslora
    assert made.config.lora_alpha == made.config.r
    assert made.config.alpha_pattern == made.config.rank_pattern


@settings(max_examples=40)
@given(several())
def test_side_by_side_is_the_sum(drawn: Drawn) -> None:
    states, weights = drawn
    same(combine.concatenate(states, weights), states, weights)


@settings(max_examples=40)
@given(several())
def test_the_sum_is_the_sum_at_no_higher_rank(drawn: Drawn) -> None:
    states, weights = drawn
    made = combine.add(states, weights)
    same(made.state, states, weights, 1e-11)
    wider = combine.concatenate(states, weights)
    for path, own in made.state.layers.items():
        for name, tensor in own.tensors.items():
            if name.endswith("lora_A"):
                assert len(tensor) <= max(1, len(wider.layers[path].tensors[name]))
    assert all(kept.energy == pytest.approx(1) for kept in made.kept)
    assert all(kept.error < 1e-11 for kept in made.kept)


@settings(max_examples=40)
@given(several(), st.sampled_from([-2.0, 0.5, 3.0]))
def test_sums_are_linear_in_their_weights(drawn: Drawn, factor: float) -> None:
    states, weights = drawn
    once = combine.concatenate(states, weights)
    scaled = combine.concatenate(states, [factor * weight for weight in weights])
    again = combine.concatenate([once], [factor])
    for path in once.layers:
        close(delta(scaled.layers[path]), factor * delta(once.layers[path]))
        close(delta(again.layers[path]), factor * delta(once.layers[path]))


@settings(max_examples=40)
@given(several())
def test_order_does_not_matter(drawn: Drawn) -> None:
    states, weights = drawn
    there = combine.add(states, weights).state
    back = combine.add(states[::-1], weights[::-1]).state
    assert there.layers.keys() == back.layers.keys()
    for path, own in there.layers.items():
        close(delta(own), delta(back.layers[path]), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_negation_cancels_and_leaves_rank_one(kind: str) -> None:
    task = state({"h": layer(kind, 3, 0.7)})
    gone = combine.add([task, combine.negate(task)])
    assert not delta(gone.state.layers["h"]).any()
    assert {kept.rank for kept in gone.kept} == {2 if kind == "spanning" else 1}
    assert all(kept.energy == 1 and kept.error == 0 for kept in gone.kept)
    assert combine.add([task, task], [1.0, -1.0], energy=0.5).kept == gone.kept
    close(delta(combine.negate(task).layers["h"]), -delta(task.layers["h"]))


def test_an_adapter_twice_has_the_rank_of_one() -> None:
    task = state({"h": layer("linear", 3, 0.7, dtype=torch.float32)})
    made = combine.add([task, task], [0.5, 2.0])
    assert made.kept[0].rank == 3
    assert made.state.layers["h"].tensors["weight.lora_A"].dtype == torch.float32
    close(delta(made.state.layers["h"]), 2.5 * delta(task.layers["h"]), 1e-6)


def test_half_precision_is_widened() -> None:
    task = state({"h": layer("linear", 3, 0.7, dtype=torch.bfloat16)})
    made = combine.concatenate([task, task])
    assert made.layers["h"].tensors["weight.lora_B"].dtype == torch.float32
    close(delta(made.layers["h"]), 2 * delta(task.layers["h"]), 1e-6)


def test_fused_slices_and_a_whole_layer_add_up() -> None:
    sliced = layer("fused", 2, 1.5, bias=True, seed=1)
    whole = layer("linear", 2, 0.5, bias=True, seed=2)
    whole = type(whole)(
        "conv1d",
        {
            **whole.tensors,
            "weight.lora_A": torch.randn(2, 5).double(),
            "weight.lora_B": torch.randn(12, 2).double(),
            "weight.lora_B_bias": torch.randn(12).double(),
        },
        0.5,
    )
    made = combine.concatenate([state({"h": sliced}), state({"h": whole})], [2.0, -1.0])
    own = made.layers["h"]
    assert (own.kind, own.enabled) == ("conv1d", ())
    close(delta(own), 2 * delta(sliced) - delta(whole))
    close(shift(own), 2 * shift(sliced) - shift(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_changes_nothing(kind: str) -> None:
    task = state({"h": layer(kind, 3, 0.7, bias=kind == "linear")})
    made = combine.resize(task, energy=1.0)
    close(delta(made.state.layers["h"]), delta(task.layers["h"]))
    close(shift(made.state.layers["h"]), shift(task.layers["h"]))
    assert all(kept.energy == pytest.approx(1, abs=1e-12) for kept in made.kept)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_is_the_best_of_its_rank_and_says_what_it_lost(rank: int) -> None:
    task = state({"h": layer("linear", 5, 0.7), "v": layer("conv", 4, 1.3)})
    made = combine.resize(task, rank=rank)
    for kept in made.kept:
        M = delta(task.layers[kept.path])
        sigma = torch.linalg.svdvals(M)
        error = (delta(made.state.layers[kept.path]) - M).norm() / M.norm()
        assert kept.rank == rank
        assert kept.error == pytest.approx(float(error), rel=1e-9)
        assert float(error) == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), rel=1e-9)
        assert kept.energy == pytest.approx(1 - kept.error**2, rel=1e-9)
    assert made.state.config.r == rank


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999])
def test_energy_gives_the_lowest_rank_that_keeps_it(energy: float) -> None:
    task = state({f"h.{n}": layer("linear", 5, 0.7, seed=n) for n in range(6)})
    made = combine.resize(task, energy=energy)
    for kept in made.kept:
        squares = torch.linalg.svdvals(delta(task.layers[kept.path])).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[kept.rank - 1] >= energy
        assert kept.rank == 1 or shares[kept.rank - 2] < energy
        assert kept.energy == pytest.approx(float(shares[kept.rank - 1]))
    ranks = {kept.path: kept.rank for kept in made.kept}
    config = made.state.config
    assert {config.rank_pattern.get(f"^h\\.{n}", config.r) for n in range(6)} == set(ranks.values())


def test_groups_share_the_rank() -> None:
    made = combine.resize(state({"h": layer("spanning", 3, 0.7)}), rank=4)
    assert len(made.state.layers["h"].tensors["weight.lora_A"]) == made.kept[0].rank == 4
    assert made.state.layers["h"].tensors["weight.lora_B"].shape == (8, 2)


def test_slices_are_cut_each_on_its_own() -> None:
    task = state({"h": layer("fused", 4, 0.7)})
    made = combine.resize(task, rank=2)
    assert [kept.path for kept in made.kept] == ["h[slice_0]", "h[slice_2]"]
    for index, kept in zip((0, 2), made.kept, strict=True):
        rows = slice(index * 4, index * 4 + 4)
        M = delta(task.layers["h"])[rows]
        error = (delta(made.state.layers["h"])[rows] - M).norm() / M.norm()
        assert kept.error == pytest.approx(float(error), rel=1e-9)


def test_full_copies_are_mixed_by_weights_that_sum_to_one() -> None:
    head = {"weight.trained": torch.tensor([1.0, 2.0]), "seen.trained": torch.tensor(4)}
    other = {"weight.trained": torch.tensor([5.0, -2.0]), "seen.trained": torch.tensor(9)}
    body = layer("linear", 2)
    states = [
        state({"h": body, "head": type(body)("module", tensors)}, modules_to_save=["head"])
        for tensors in (head, other)
    ]
    made = combine.concatenate(states, [0.25, 0.75])
    assert made.layers["head"].kind == "module"
    assert made.layers["head"].tensors["weight.trained"].tolist() == [4.0, -1.0]
    assert made.layers["head"].tensors["seen.trained"].tolist() == 8
    assert made.config.modules_to_save == ["head"]
    bare = [combine.without_copies(each) for each in states]
    assert list(combine.add(bare).state.layers) == ["h"]


def test_what_the_adapters_agree_on_is_kept() -> None:
    a = state({"h": layer("linear", 2)}, "f:1", task_type="SEQ_CLS", base_model_name_or_path="m")
    b = state({"h": layer("linear", 3)}, "f:1", task_type="CAUSAL_LM", bias="all")
    made = combine.concatenate([a, b])
    assert made.base == "f:1"
    assert made.config.task_type is None
    assert made.config.base_model_name_or_path == "m"
    assert made.config.bias == "all"
    wider = state({"h": layer("linear", 2), "v": layer("linear", 2)}, "f:2")
    assert combine.concatenate([a, wider]).base == "f:2"
    assert combine.concatenate([a, state({"v": layer("linear", 2)}, "f:3")]).base is None


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv", "fused"])
def test_a_portable_adapter_has_one_rank_and_alpha(kind: str) -> None:
    task = state({"h": layer(kind, 3, 0.7), "v": layer("linear", 1, 5.0)}, use_rslora=True)
    made = combine.portable(task)
    ranks = {len(own.tensors["weight.lora_A"]) for own in made.layers.values()}
    assert ranks == {made.config.r} == {made.config.lora_alpha}
    assert not made.config.rank_pattern and not made.config.alpha_pattern
    for path, own in made.layers.items():
        close(delta(own), delta(task.layers[path]))


def test_a_start_that_is_subtracted_counts_with_its_sign() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv1d(4, 6, 3, groups=2)).requires_grad_(False)
    for name in ("a", "b"):
        config = deltaw.LoraConfig(
            r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights="olora"
        )
        deltaw.attach(model, config, name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    states = [deltaw.capture(model, name) for name in ("a", "b")]
    before = [layer.weight.clone() for layer in model]
    deltaw.activate(model, {"a": 0.75, "b": -2.0})
    with deltaw.merged(model):
        deltas = [layer.weight - W for layer, W in zip(model, before, strict=True)]
    deltaw.detach(model)
    deltaw.attach(model, combine.add(states, [0.75, -2.0]).state, trainable=False)
    with deltaw.merged(model):
        for layer, W, delta in zip(model, before, deltas, strict=True):
            torch.testing.assert_close(layer.weight - W, delta, rtol=1e-5, atol=1e-6)


def test_attention_and_transposed_convolutions_in_a_model() -> None:
    model = nn.Sequential(
        nn.MultiheadAttention(6, 3, kdim=4, vdim=5), nn.ConvTranspose1d(4, 6, 3, groups=2)
    ).double()
    paths = ["0", "1"]
    for seed, (name, enabled) in enumerate(
        {"a": (True,) * 4, "b": (True, False, True, False)}.items()
    ):
        config = deltaw.LoraConfig(
            r=2 + seed,
            lora_alpha=3,
            target_modules=paths,
            enable_lora={"0": enabled},
            init_lora_weights=False,
        )
        deltaw.attach(model, config, name, generator=torch.Generator().manual_seed(seed))
    weights = {"a": 0.5, "b": -2.0}
    states = [deltaw.capture(model, name) for name in weights]
    deltaw.activate(model, weights)
    with deltaw.merged(model):
        expected = {n: p.clone() for n, p in model.named_parameters() if "adapter" not in n}
    deltaw.detach(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for made in (combine.concatenate, lambda *given: combine.add(*given).state):
        deltaw.attach(model, made(states, list(weights.values())))
        with deltaw.merged(model):
            for name, merged in expected.items():
                found = model.get_parameter(name)
                torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)
                assert name.endswith("bias") or not torch.equal(found, before[name])
        deltaw.detach(model)
