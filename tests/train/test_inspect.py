"""Norms from Gram matrices equal norms of the ΔW they never form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.analysis.inspect import delta_norm, report
from deltaw.analysis.show import text
from deltaw.state import LayerState, State


def layer(A: Tensor, B: Tensor, kind: str = "linear", **more: object) -> LayerState:
    tensors = {"weight.lora_A": A, "weight.lora_B": B}
    return LayerState(kind, tensors, **more)  # type: ignore[arg-type]


@given(
    r=st.integers(1, 5), out=st.integers(1, 7), inside=st.integers(1, 7), seed=st.integers(0, 99)
)
def test_the_norm_of_a_product(r: int, out: int, inside: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(r, inside, generator=draw)
    B = torch.randn(out, r, generator=draw)
    exact = 0.3 * (B.double() @ A.double()).norm().item()
    assert delta_norm(layer(A, B, scale=0.3), "weight") == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_a_convolution_that_spans_its_groups() -> None:
    A, B = torch.randn(6, 4, 3), torch.randn(8, 3)  # R = 6 over 2 groups
    parts = [b @ a.flatten(1) for a, b in zip(A.chunk(2), B.chunk(2), strict=True)]
    exact = torch.cat(parts).norm().item()
    found = delta_norm(layer(A, B, "conv", groups=2), "weight")
    assert found == pytest.approx(exact, rel=1e-5)


def test_dead_and_broken_layers_are_named_and_shares_need_the_base() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 6) for name in ("good", "dead", "nan")})
    layers = {
        "good": layer(torch.ones(2, 4), torch.ones(6, 2), scale=2.0),
        "dead": layer(torch.ones(2, 4), torch.zeros(6, 2)),
        "nan": layer(torch.ones(2, 4), torch.full((6, 2), float("nan"))),
    }
    state = State(deltaw.LoraConfig(r=2), layers)
    found = report(state, model)
    assert (found.dead, found.broken) == (["dead"], ["nan"])
    good = next(row for row in found.layers if row.path == "good")
    assert good.norm == pytest.approx(4 * 24**0.5)
    assert good.relative == pytest.approx(good.norm / model["good"].weight.norm().item())
    assert all(row.relative is None for row in report(state).layers)
    shown = text(found)
    assert "dead (ΔW is zero): dead" in shown
    assert "NaN or Inf in: nan" in shown


@pytest.mark.parametrize("use_dora", [False, True])
def test_shares_of_slices_and_of_dora(use_dora: bool) -> None:
    """Also of GPT-2's Conv1D, which stores (in, out)."""
    model = nn.Sequential(Conv1D(9, 5), nn.Linear(9, 6), nn.Embedding(4, 3)).requires_grad_(False)
    config = deltaw.LoraConfig(
        r=2,
        target_modules=["0", "1", "2"],
        use_dora=use_dora,
        enable_lora={"0": [True, False, True]},
    )
    deltaw.attach(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.rand(parameter.shape)
    state = deltaw.capture(model)
    before = [model[i].weight.clone() for i in range(3)]
    with deltaw.merged(model):
        deltas = [model[i].weight - W for i, W in enumerate(before)]
    deltaw.detach(model)
    found = {row.path: row for row in report(state, model).layers}
    expected = {
        "0[slice_0]": (deltas[0][:, :3], before[0][:, :3]),
        "0[slice_2]": (deltas[0][:, 6:], before[0][:, 6:]),
        "1": (deltas[1], before[1]),
        "2": (deltas[2], before[2]),
    }
    assert found.keys() == expected.keys()
    for path, (delta, W) in expected.items():
        share = float(delta.norm() / W.norm())
        assert found[path].relative == pytest.approx(share, rel=1e-5)


def test_a_captured_adapter_matches_its_merged_weights() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv1d(4, 6, 3, groups=2))
    config = deltaw.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"])
    deltaw.attach(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_()
    before = {path: model.get_submodule(path).weight.clone() for path in "01"}
    found = {row.path: row for row in report(deltaw.capture(model), model).layers}
    deltaw.merge(model)
    for path, weight in before.items():
        moved = (model.get_submodule(path).weight - weight).norm().item()
        assert found[path].norm == pytest.approx(moved, rel=1e-4)
        assert found[path].relative == pytest.approx(moved / weight.norm().item(), rel=1e-4)
