"""Law 4: disabled and detached are the base; a merge rounds once; unmerge gives the bits back."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
import deltaw.kernels.merge
from deltaw.errors import MergeError, StateError
from laws import oracle
from laws.building import (
    adapt,
    adapted,
    assert_same_state,
    base,
    base_state,
    fill,
    parts,
    run,
    same_bits,
)
from laws.cases import Stack
from laws.product import DTYPES, Setting, fits, setting
from laws.running import over_cases, over_pairs, whole_product

HALF = (torch.bfloat16, torch.float16)


def mergeable(setting: Setting) -> bool:
    """Leave out what a merge refuses."""
    return setting.mergeable


def off_is_the_base(setting: Setting) -> None:
    """Bitwise, in `disabled`, with nothing active, and after `detach`."""
    model = base(setting)
    before = run(model, setting)
    fill(adapt(model, setting))
    with deltaw.disabled(model):
        assert same_bits(run(model, setting), before)
    deltaw.activate(model, None)
    assert same_bits(run(model, setting), before)
    deltaw.activate(model, "default")
    assert not torch.equal(run(model, setting), before)
    deltaw.detach(model)
    assert same_bits(run(model, setting), before)


def merged_weight_is_rounded_once(setting: Setting) -> None:
    """On a grid where float32 is exact the merged bits are those of round(W + ΔW)."""
    r = next(r for r in (4, 2, 1) if fits(setting.case, setting.init, r))
    setting = setting.but(rank=(r, 3.0), rslora=False)
    model = fill(adapt(base(setting), setting))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in parts(model):
            held = (*adapter.parameters(), *adapter.buffers())
            for tensor in held if not adapter.replaces else ():
                whole = torch.randint(-9, 10, tensor.shape, generator=generator)
                tensor.copy_(whole * (tensor != 0) / 8)
    state = deltaw.capture(model).layers["layer"].tensors
    tensors = {k: t.double() for k, t in state.items()}
    case, layer = setting.case, model.layer
    deltas = {"weight": 0} if case.form == "module" else case.deltas(layer, tensors, 3 / r)
    wide = torch.promote_types(torch.float32, setting.dtype)
    expected = {}
    for name, delta in deltas.items():
        W = layer.dense() if name == "weight" else layer.frozen(name)
        W = tensors.get(f"{name}.trained", W.detach().double())
        expected[name] = (W + delta).to(wide).to(setting.dtype)
    deltaw.merge(model)
    for name, merged in expected.items():
        assert torch.equal(model.layer.frozen(name), merged)  # the sign of a zero may differ
        assert model.layer.frozen(name).dtype == setting.dtype


def merge_keeps_the_output(setting: Setting) -> None:
    """Merged and unmerged models agree, and `unmerge` gives every bit and the output back."""
    model = adapted(setting)
    keys = list(model.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = run(model, setting)
    with deltaw.disabled(model):
        base = run(model, setting)
    deltaw.merge(model)
    merged = run(model, setting)
    assert setting.case.packed or list(model.state_dict()) == keys
    # Rounding is as large as the terms of the sum, which may cancel in so small a layer.
    size = max(plain.double().norm(), base.double().norm()).clamp(1e-3)
    difference = (merged.double() - plain.double()).norm() / size
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(setting.dtype, 3e-2)
    assert difference <= max(tolerance, setting.case.slack)
    deltaw.unmerge(model)
    assert_same_state(dict(model.state_dict()), before)
    assert same_bits(run(model, setting), plain)


@over_pairs()
def test_off_is_the_base(setting: Setting) -> None:
    off_is_the_base(setting)


@over_pairs(mergeable)
def test_merge_keeps_the_output(setting: Setting) -> None:
    merge_keeps_the_output(setting)


@over_pairs(lambda s: s.mergeable and (s.bias, s.lora_bias, s.method) == ("none", False, "lora"))
def test_merged_weight(setting: Setting) -> None:
    merged_weight_is_rounded_once(setting)


@pytest.mark.slow
@over_cases()
def test_merge_everywhere(case) -> None:
    whole_product(case, off_is_the_base)
    whole_product(case, merge_keeps_the_output, mergeable)


def general_values_are_rounded_once(dtype: torch.dtype) -> None:
    """Of any values: within half a unit of the exact sum, plus what float32 itself loses."""
    s = setting("linear", dtype=dtype, rank=(3, 5.0))
    model = fill(adapt(base(s), s), size=0.7)
    tensors = {k: t.double() for k, t in deltaw.capture(model).layers["layer"].tensors.items()}
    exact = model.layer.weight.double() + oracle.linear_delta(model.layer, tensors, 5 / 3)
    deltaw.merge(model)
    found = model.layer.weight.detach()
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    float32 = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slack = 8 * float32 * exact.abs().clamp(min=1) * (dtype is not torch.float64)
    assert ((found.double() - exact).abs() <= unit / 2 + slack + 1e-15).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_general_values_are_rounded_once(dtype: torch.dtype) -> None:
    general_values_are_rounded_once(dtype)


def merged_sum_is_the_oracles(dtype: torch.dtype = torch.float32) -> None:
    """Several adapters: W + Σ weight ΔW, and the biases likewise."""
    s = setting("linear", dtype=dtype, bias="all", lora_bias=True)
    model = base(s)
    for seed, name in enumerate("abc"):
        fill(adapt(model, s, name, seed), name, seed)
    weights = {"c": -0.5, "a": 1.5}
    deltaw.activate(model, weights)
    W, b = (model.layer.frozen(n).detach().double() for n in ("weight", "bias"))
    exact, bias = W, b
    for name, weight in weights.items():
        t = {k: v.double() for k, v in deltaw.capture(model, name).layers["layer"].tensors.items()}
        exact = exact + weight * oracle.linear_delta(model.layer, t, s.scale)
        bias = bias + weight * (t["bias.trained"] - b + s.scale * t["weight.lora_B_bias"])
    plain = run(model, s)
    with deltaw.merged(model):
        assert (model.layer.weight.double() - exact).abs().max() <= 3e-7 * exact.abs().max()
        assert (model.layer.bias.double() - bias).abs().max() <= 3e-7 * bias.abs().max()
        assert torch.allclose(run(model, s), plain, rtol=1e-5, atol=1e-5)
    assert same_bits(run(model, s), plain)


def test_merged_sum() -> None:
    merged_sum_is_the_oracles()


class Tiny(nn.Module):
    """Two layers, small enough for a thousand merges."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.b = nn.Conv1d(4, 2, 3, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mT)


def cycles_keep_the_bits(dtype: torch.dtype, cycles: int, folder: Path) -> None:
    """Merge and unmerge, with saving, copies, switches and other adapters between."""
    torch.manual_seed(1)
    model = Tiny().to(dtype).eval()
    settings = deltaw.LoraConfig(r=2, lora_alpha=3, target_modules=["a", "b"], bias="all")
    for seed, name in enumerate("xyz"):
        deltaw.attach(model, settings, name)
        fill(model, name, seed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = base_state(model)
    choices = ("x", {"x": 0.5, "y": 2.0}, "z", {"x": 1.0, "y": 1.0, "z": -1.0})
    for cycle in range(cycles):
        deltaw.activate(model, choices[cycle % 4])
        deltaw.merge(model, original=("keep", "cpu")[cycle % 2])
        assert not same_bits(model.a.frozen("weight"), first["a.weight"])
        if cycle % 50 == 7:
            model = copy.deepcopy(model)
        if cycle % 100 == 9:
            deltaw.save(model, folder / "adapter", "y")
            model.train().eval()
        deltaw.unmerge(model)
        if cycle % 200 == 11:
            deltaw.load(model, folder / "adapter", "y", trainable=True, swap=True)
        if cycle % 20 == 0:
            assert_same_state(base_state(model), first)
    assert_same_state(dict(model.state_dict()), before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_thousand_cycles(dtype: torch.dtype, tmp_path: Path) -> None:
    cycles_keep_the_bits(dtype, 1000, tmp_path)


@pytest.mark.parametrize("place", ["keep", "cpu", "file", "none"])
@over_cases(lambda case: case.mergeable and "-" not in case.name)
def test_where_the_original_is_kept(case, place: str, tmp_path: Path) -> None:
    s = Setting(case, dtype=torch.bfloat16)
    model = adapted(s)
    before = base_state(model)
    plain = run(model, s)
    path = tmp_path / "base.safetensors" if place == "file" else None
    deltaw.merge(model, original=place, path=path)
    kept = [o.tensor for m in model.modules() for o in getattr(m, "originals", {}).values()]
    assert (place == "file") == bool(kept and all(t is None for t in kept))
    if place == "none":
        assert kept == []
        with pytest.raises(StateError, match="final"):
            deltaw.unmerge(model)
        merged = run(model, s)
        deltaw.detach(model)
        assert same_bits(run(model, s), merged)
        return
    deltaw.unmerge(model)
    assert_same_state(base_state(model), before)
    assert same_bits(run(model, s), plain)


def test_the_bases_own_file_keeps_the_originals(tmp_path: Path) -> None:
    model = Stack().eval()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    before = base_state(model)
    deltaw.attach(model, deltaw.LoraConfig(target_modules=["up", "gpt2", "mixing"]))
    fill(model)
    deltaw.merge(model, original="file", path=tmp_path / "model.safetensors")
    deltaw.unmerge(model)
    assert_same_state(base_state(model), before)


def unmerge_refuses_changed_weights(change: Callable[[nn.Parameter], object]) -> None:
    """What was written since the merge is not thrown away in silence."""
    s = setting("linear")
    model = adapted(s)
    deltaw.merge(model)
    with torch.no_grad():
        change(model.layer.weight)
    changed = base_state(model)
    with pytest.raises(MergeError, match=r"layer\.weight"):
        deltaw.unmerge(model)
    assert_same_state(base_state(model), changed)


CHANGES = {
    "in place": lambda w: w[0, 0].add_(1),
    "data": lambda w: w.data.mul_(1.01),
    "swapped": lambda w: w.copy_(w.flip(0)),
    "new data": lambda w: setattr(w, "data", w.data + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unmerge_refuses_changed_weights(change) -> None:
    unmerge_refuses_changed_weights(change)


def test_train_and_eval_never_touch_weights() -> None:
    s = setting("conv2d", head=True)
    model = adapted(s)
    for merged in (False, True):
        if merged:
            deltaw.merge(model)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.train().eval().train(True).train(False)
        assert_same_state(dict(model.state_dict()), before)


def test_a_tied_weight_gets_its_own_copy_when_asked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x))

    model = Tied().eval()
    deltaw.attach(model, deltaw.LoraConfig(target_modules=["out"]))
    fill(model)
    x = torch.arange(7)
    plain, before = model(x), base_state(model)
    with pytest.raises(MergeError, match=r"out\.weight is tied to embed\.weight.*untie=True"):
        deltaw.merge(model)
    assert_same_state(base_state(model), before)
    deltaw.merge(model, untie=True)
    assert torch.allclose(model(x), plain, atol=1e-5)
    assert same_bits(model.embed.weight, before["embed.weight"])
    deltaw.unmerge(model)
    assert model.out.weight is model.embed.weight
    assert same_bits(model(x), plain)


def thin_factors_are_the_layout(setting: Setting) -> None:
    """L R is ΔW in the layout of the weight, for each slot."""
    setting = setting.but(dtype=torch.float64, head=False, bias="none")
    close = 1e-12 if setting.dtype is torch.float64 else 1e-5
    model = adapted(setting)
    layer = model.layer
    for slot, adapter, _ in layer.contributors():
        A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
        thin = layer.thin(A, B, slot)
        formed = setting.case.form == "spanning" or setting.case.file == "conv_transpose"
        expected = formed or layer.layout(B @ A, slot)
        if thin is None:
            assert formed
        else:
            L, R = thin
            shape = (
                layer.dense_shape()
                if setting.case.packed
                else layer.frozen(layer.holder(slot)).shape
            )
            assert torch.allclose((L @ R).view(shape), expected, atol=close)


@over_pairs(lambda s: s.case.form != "module" and s.method == "lora")
def test_thin_factors(setting: Setting) -> None:
    thin_factors_are_the_layout(setting)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_rows_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr(deltaw.kernels.merge, "GROUP_BYTES", size)
        model = adapted(setting("fused-101", dtype=dtype))
        deltaw.merge(model)
        merged.append(model.layer.weight.detach().clone())
    eps = torch.finfo(dtype).eps
    assert all(torch.allclose(other, merged[0], rtol=2 * eps, atol=eps) for other in merged)
