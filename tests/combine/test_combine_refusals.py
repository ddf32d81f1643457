"""Adapters that do not go together, and settings out of range: one error that lists all."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from combine_states import layer, state

from deltaw import combine
from deltaw.errors import ConfigError, MergeError
from deltaw.state import LayerState, State

A = state({"h": layer("linear", 2), "v": layer("conv", 2)}, "f32/8 rows:1")

VERBS: list[Callable[..., object]] = [
    combine.concatenate,
    combine.add,
    combine.ties,
    combine.dare,
    combine.prune,
]


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_and_wrong_weights_are_refused(verb: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="nothing to combine"):
        verb([])
    with pytest.raises(ConfigError, match="2 adapters need as many weights, not 1"):
        verb([A, A], [1.0])
    with pytest.raises(ConfigError, match="finite"):
        verb([A], [float("nan")])


@pytest.mark.parametrize("verb", VERBS)
def test_every_broken_tensor_and_method_is_listed(verb: Callable[..., object]) -> None:
    h = A.layers["h"]
    broken = {**h.tensors, "weight.lora_B": torch.full((6, 2), float("nan"))}
    extra = {**h.tensors, "weight.lora_magnitude_vector": torch.ones(6)}
    states = [
        State(A.config, {"h": replace(h, tensors=broken), "v": A.layers["v"]}),
        State(A.config, {"h": replace(h, tensors=extra)}),
        State(replace(A.config, method="hira"), A.layers),
        State(A.config, {}),
        State(A.config, {"h": replace(h, tensors={"weight.lora_A": h.tensors["weight.lora_A"]})}),
    ]
    with pytest.raises(MergeError) as error:
        verb(states)
    assert str(error.value).splitlines()[1:-1] == [
        "  - adapter 1, 'h': weight.lora_B has 12 NaN or Inf of 12",
        "  - adapter 2, 'h': weight.lora_magnitude_vector is not linear in its factors",
        "  - adapter 3: its method is 'hira', not linear in its factors",
        "  - adapter 4: it is empty",
        "  - adapter 5, 'h': weight.lora_B is missing",
    ]
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_misfit_between_adapters_is_listed(verb: Callable[..., object]) -> None:
    other = state(
        {
            "h": LayerState(
                "linear", {"weight.lora_A": torch.ones(2, 8), "weight.lora_B": torch.ones(6, 2)}
            ),
            "v": layer("spanning", 2),
            "w": LayerState("module", {"weight.trained": torch.ones(3)}),
        },
        "f32/8 rows:2",
    )
    third = state({"w": layer("linear", 2)})
    same_layers = replace(A, base="f32/8 rows:3")
    with pytest.raises(MergeError) as error:
        verb([A, other, third, same_layers])
    assert str(error.value).splitlines()[1:-1] == [
        "  - adapter 2 was trained on another base than adapter 1",
        "  - adapter 4 was trained on another base than adapter 1",
        "  - h: weight is linear 6 x 7 in adapter 1, linear 6 x 8 in adapter 2",
        "  - v: weight is conv 8 x 3 x 2 x 1 in adapter 1, "
        "conv 8 x 6 x 2 x 1 in 2 groups in adapter 2",
        "  - w: weight is trained in full as (3,) in adapter 2, linear 6 x 7 in adapter 3",
    ]


def test_bases_are_compared_in_one_dtype_and_over_the_same_layers() -> None:
    half = replace(A, base="bf16/8 rows:2")
    fewer = state({"h": layer("linear", 2)}, "f32/8 rows:3")
    combine.concatenate([A, half, fewer])


def test_full_copies_under_other_weights_are_refused_by_name() -> None:
    head = LayerState("module", {"weight.trained": torch.ones(3), "bias.trained": torch.ones(1)})
    with_head = state({"h": layer("linear", 2), "head": head})
    with pytest.raises(MergeError) as error:
        combine.add([with_head, with_head], [1.0, 1.0])
    assert "  - head.weight: 2\n  - head.bias: 2\n" in str(error.value)
    assert "without_copies" in str(error.value)
    with pytest.raises(MergeError, match=r"head\.weight: -1"):
        combine.negate(with_head)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank must be a whole number above 0, not 0"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"energy": 0.0}, r"energy must lie in \(0, 1\], not 0.0"),
        ({"energy": 1.01}, r"energy must lie in \(0, 1\]"),
        ({"energy": float("nan")}, r"energy must lie in \(0, 1\]"),
        ({"rank": 2, "energy": 0.5}, "Both rank and energy"),
        ({"rank": 7}, "rank 7 is above that of every matrix; the largest, 'h', has 6"),
    ],
)
def test_ranks_and_energies_out_of_range(settings: dict[str, float], told: str) -> None:
    task = state({"h": layer("linear", 2)})
    for verb in (combine.add, combine.ties, combine.dare, combine.prune):
        with pytest.raises(ConfigError, match=told):
            verb([task], **settings)
    with pytest.raises(ConfigError, match=told):
        combine.resize(task, **settings)


def test_resizing_needs_one_limit() -> None:
    with pytest.raises(ConfigError, match="Neither rank nor energy"):
        combine.resize(A)


def test_a_rank_above_that_of_small_layers_keeps_them_whole() -> None:
    small = LayerState(
        "linear", {"weight.lora_A": torch.randn(2, 3), "weight.lora_B": torch.randn(2, 2)}
    )
    task = state({"h": layer("linear", 6), "small": small})
    made = combine.resize(task, rank=4)
    assert {kept.path: kept.rank for kept in made.kept} == {"h": 4, "small": 2}
    assert made.kept[1].error < 1e-12


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), True])
def test_densities_out_of_range(density: float) -> None:
    for verb in (combine.ties, combine.dare, combine.prune):
        with pytest.raises(ConfigError, match=r"density must lie in \(0, 1\]"):
            verb([A], density=density)
    with pytest.raises(ConfigError, match="majority must be one of total, frequency"):
        combine.ties([A], majority="loudest")
    with pytest.raises(ConfigError, match="majority"):
        combine.dare([A], majority="loudest")


def test_what_cannot_be_portable_is_listed() -> None:
    task = state(
        {
            "a": LayerState(
                "attention", {"q.lora_A": torch.ones(1, 3), "q.lora_B": torch.ones(3, 1)}
            ),
            "b": layer("linear", 2, bias=True),
            "g": layer("grouped", 2),
            "h": LayerState("module", {"weight.trained": torch.ones(3)}),
        }
    )
    with pytest.raises(MergeError) as error:
        combine.portable(task)
    assert str(error.value).splitlines()[1:-1] == [
        "  - a: projections of an nn.MultiheadAttention",
        "  - b: weight.lora_B_bias",
        "  - g: a convolution that is grouped or factored",
        "  - h: weight.trained is trained in full",
    ]


def test_adapters_that_name_different_bases_are_refused() -> None:
    """By the last part of the name, which may be a path; a fingerprint knows better."""

    def named(name: str | None, mark: str | None = None) -> State:
        return state({"h": layer("linear", 2)}, mark, base_model_name_or_path=name)

    combine.add([named("org/model-A"), named("/tmp/model-a"), named(None)])
    combine.add([named("org/A", "f32/8 rows:1"), named("org/B", "f32/8 rows:1")])
    with pytest.raises(MergeError, match="adapter 2 is for org/B, adapter 1 for org/A"):
        combine.add([named("org/A"), named("org/B")])
