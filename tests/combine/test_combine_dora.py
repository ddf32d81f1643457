"""Sums of DoRA adapters are DoRA adapters of the same ΔW, whatever the layer."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw import combine
from deltaw.errors import FormatError, MergeError
from deltaw.state import State

LAYERS = ["lin", "emb", "conv", "grouped", "turned", "qkv"]
WEIGHTS = [0.7, -0.4, 1.3]


class Body(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)
        self.emb = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(3, 6, (2, 3))
        self.grouped = nn.Conv1d(6, 8, 3, groups=2)
        self.turned = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.qkv = nn.Linear(6, 12)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Body().double()


@pytest.fixture(scope="module")
def stored(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> combine.StoredBase:
    file = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_file(base.state_dict(), file)
    return combine.StoredBase(file)


def adapter(base: nn.Module, seed: int, **settings: Any) -> State:
    """An adapter with every tensor drawn at random."""
    model = copy.deepcopy(base)
    given: dict[str, Any] = {"target_modules": LAYERS, "lora_alpha": 5, **settings}
    deltaw.attach(model, deltaw.LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * (0.1 if "magnitude" in name else 0.4))
    return deltaw.capture(model)


@pytest.fixture(scope="module")
def three(base: nn.Module) -> list[State]:
    """Two of DoRA and one of LoRA, of other ranks, scales, layers and slices."""
    on = {"enable_lora": {"qkv": [True, False, True]}}
    last = {"enable_lora": {"qkv": [False, True, True]}}
    return [
        adapter(base, 1, r=2, use_dora=True, **on),
        adapter(base, 2, r=3, use_dora=True, use_rslora=True, **last),
        adapter(base, 3, r=1, target_modules=["lin", "conv", "qkv"], **on),
    ]


def merged(base: nn.Module, state: State) -> dict[str, Tensor]:
    """The weights of the base with an adapter merged by its own layers."""
    model = copy.deepcopy(base)
    deltaw.attach(model, state)
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    return {name: tensor for name, tensor in model.state_dict().items() if "weight" in name}


def wanted(base: nn.Module, states: list[State], weights: list[float]) -> dict[str, Tensor]:
    """W + Σ wᵢ ΔWᵢ of every layer, from the merges of each adapter alone."""
    found = {name: t.clone() for name, t in base.state_dict().items() if "weight" in name}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in merged(base, state).items():
            found[name] += weight * (tensor - base.state_dict()[name])
    return found


def assert_merges_to(base: nn.Module, state: State, weights: dict[str, Tensor]) -> None:
    for name, tensor in merged(base, state).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-11, atol=1e-11, msg=name)


def test_a_sum_is_exact_side_by_side_and_at_its_lowest_rank(
    base: nn.Module, three: list[State], stored: combine.StoredBase
) -> None:
    sums = wanted(base, three, WEIGHTS)
    for made in (
        combine.concatenate(three, WEIGHTS, base=stored),
        combine.add(three, WEIGHTS, base=stored).state,
    ):
        assert made.config.use_dora and made.config.lora_alpha == made.config.r
        assert sorted(made.layers) == sorted(LAYERS)
        assert_merges_to(base, made, sums)


def test_fused_slices_and_a_whole_layer_add_up_under_dora(
    base: nn.Module, stored: combine.StoredBase
) -> None:
    only = {"target_modules": ["qkv"], "use_dora": True}
    sliced = adapter(base, 1, r=2, enable_lora={"qkv": [True, False, True]}, **only)
    whole = adapter(base, 2, r=2, **only)
    made = combine.concatenate([sliced, whole], [0.5, 2.0], base=stored)
    assert made.layers["qkv"].kind == "linear"
    assert_merges_to(base, made, wanted(base, [sliced, whole], [0.5, 2.0]))


@pytest.mark.parametrize("settings", [{}, {"kdim": 4, "vdim": 5}, {"add_bias_kv": True}])
def test_attention_adds_up_under_dora(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(6, 3, **settings)}).double()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    where = combine.StoredBase(tmp_path / "model.safetensors")
    own: dict[str, Any] = {"target_modules": ["mha"], "use_dora": True}
    states = [
        adapter(model, 1, r=2, enable_lora={"mha": [True, False, True, False]}, **own),
        adapter(model, 2, r=1, **own),
        adapter(model, 3, r=3, target_modules=["mha"]),
    ]
    assert not any(map(where.is_other_than, states[:2]))
    sums = wanted(model, states, WEIGHTS)
    for made in (
        combine.concatenate(states, WEIGHTS, base=where),
        combine.add(states, WEIGHTS, base=where).state,
    ):
        assert_merges_to(model, made, sums)
    cut = combine.resize(states[0], rank=1, base=where).state
    assert set(cut.layers["mha"].tensors) == set(states[0].layers["mha"].tensors)
    with torch.no_grad():
        model["mha"].out_proj.weight.add_(1)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match="was trained on another base than the one given"):
        combine.add(states, base=combine.StoredBase(tmp_path / "other.safetensors"))


def test_a_cut_keeps_the_gains_and_the_best_of_the_rest(
    base: nn.Module, three: list[State], stored: combine.StoredBase
) -> None:
    """The nearest of rank one to what is added beside the gains, by the SVD of that."""
    task = three[1]
    made = combine.resize(task, rank=1, base=stored)
    own, W = task.layers["lin"], base.lin.weight.detach()
    A, B = (own.tensors[f"weight.lora_{x}"] for x in "AB")
    V = W + own.scale * B @ A
    g = (own.tensors["weight.lora_magnitude_vector"] / V.norm(dim=1))[:, None]
    U, S, Vh = torch.linalg.svd(g * own.scale * (B @ A))
    nearest = g * W + S[0] * U[:, :1] @ Vh[:1]
    torch.testing.assert_close(merged(base, made.state)["lin.weight"], nearest)
    lost = float(S[1:].square().sum() / S.square().sum())
    assert next(k for k in made.kept if k.path == "lin").energy == pytest.approx(1 - lost)


def test_negation_takes_away_what_was_added(
    base: nn.Module, three: list[State], stored: combine.StoredBase
) -> None:
    made = combine.negate(three[0], base=stored)
    assert_merges_to(base, made, wanted(base, [three[0]], [-1.0]))


def test_one_of_dora_needs_its_own_base(
    base: nn.Module, three: list[State], tmp_path: Path
) -> None:
    with pytest.raises(MergeError, match="adapter 1: the ΔW of DoRA depends on the base"):
        combine.add(three)
    for verb in (combine.ties, combine.dare, combine.prune):
        with pytest.raises(MergeError, match="adapter 1: the ΔW of DoRA depends"):
            verb(three)
    other = {name: tensor + 0.1 for name, tensor in base.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match="adapter 2 was trained on another base than the one"):
        combine.add(three, base=combine.StoredBase(tmp_path / "other.safetensors"))
    del other["lin.weight"], other["conv.weight"]
    save_file(other, tmp_path / "less.safetensors")
    unmarked = [replace(state, base=None) for state in three]
    for states in (three, unmarked):
        with pytest.raises(MergeError, match=r"depends:\n  - conv\.weight\n  - lin\.weight\nFix"):
            combine.add(states, base=combine.StoredBase(tmp_path / "less.safetensors"))
    other["conv.weight"], other["lin.weight"] = torch.ones(6, 3, 2, 3), torch.ones(5, 8)
    save_file(other, tmp_path / "wide.safetensors")
    with pytest.raises(
        MergeError, match=r"lin\.weight is \(5, 8\) in .*, and the adapter is for 5 x 7"
    ):
        combine.add(unmarked, base=combine.StoredBase(tmp_path / "wide.safetensors"))
    with pytest.raises(FormatError, match="There is no"):
        combine.StoredBase(tmp_path / "nowhere")


def test_rows_whose_gains_cancel_are_said(base: nn.Module, stored: combine.StoredBase) -> None:
    task = adapter(base, 1, r=2, use_dora=True, target_modules=["lin"])
    own = task.layers["lin"]
    zero = {**own.tensors, "weight.lora_B": torch.zeros(5, 2).double()}
    zero["weight.lora_magnitude_vector"] = 2 * base.lin.weight.detach().norm(dim=1)
    doubled = replace(task, layers={"lin": replace(own, tensors=zero)})
    with pytest.raises(MergeError, match="cancel 5 rows of W"):
        combine.concatenate([doubled], [-1.0], base=stored)
