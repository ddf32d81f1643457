"""What the two libraries do with adapters that they read from the same files."""

import copy
from pathlib import Path

import pytest
import torch
from peft_pair import (
    IDS,
    TARGETS,
    Convolution,
    Mlp,
    Tokens,
    X,
    close,
    gpt2,
    llama,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    peft,
    quiet,
    randomise,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.errors import FormatError, MergeError

KINDS = {
    "linear": (lambda: seeded(Mlp), X, TARGETS),
    "embedding": (lambda: seeded(Tokens), torch.arange(11).view(1, 11), ["emb"]),
    "conv": (lambda: seeded(lambda: Convolution(2, 3)), torch.linspace(-1, 1, 120), ["conv"]),
    "gpt2": (gpt2, IDS, ["c_attn", "c_fc"]),
    "llama": (llama, IDS, "all-linear"),
}


def case(kind: str) -> tuple[nn.Module, object, object]:
    make, x, targets = KINDS[kind]
    return make(), x.view(1, 4, 6, 5) if kind == "conv" else x, targets


@pytest.fixture
def two(tmp_path: Path) -> tuple[nn.Module, nn.Module, dict[str, Path], nn.Module]:
    """Adapters `a` and `b` of different ranks and scales under PEFT and under deltaw."""
    base = seeded(Mlp)
    settings = {
        "a": {"r": 3, "lora_alpha": 7, "target_modules": TARGETS},
        "b": {"r": 2, "lora_alpha": 5, "target_modules": ["lin"], "use_rslora": True},
    }
    folders = {
        name: saved_by_peft(with_peft(base, name, seed, **options), tmp_path) / name
        for seed, (name, options) in enumerate(settings.items())
    }
    theirs = loaded_by_peft(base, folders["a"], "a")
    with quiet():
        theirs.load_adapter(str(folders["b"]), "b")
    ours = loaded_by_deltaw(base, folders["a"], "a")
    deltaw.load(ours, folders["b"], "b")
    return theirs, ours, folders, base


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".adapter." not in n}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_22_merged_and_unmerged_logits_are_the_same(kind: str, tmp_path: Path) -> None:
    base, x, targets = case(kind)
    theirs = with_peft(base, r=3, lora_alpha=7, target_modules=targets)
    ours = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path))
    before = output(ours, x)
    deltaw.merge(ours)
    tolerance = 1e-6 if kind not in ("gpt2", "llama") else 2e-6
    close(output(ours, x), before, tolerance)
    with quiet():
        close(output(theirs.merge_and_unload(), x), output(ours, x), tolerance)
    assert not torch.allclose(before, output(base, x), atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_23_a_merged_model_is_saved_as_a_plain_one(kind: str, tmp_path: Path) -> None:
    base, x, targets = case(kind)
    ours = with_deltaw(base, r=3, lora_alpha=7, target_modules=targets)
    before = output(ours, x)
    deltaw.merge(ours, original="none")
    deltaw.detach(ours)
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    plain = copy.deepcopy(base)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    close(output(plain, x), before)
    assert type(ours) is type(plain)


def test_23_a_merged_transformer_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    ours = with_deltaw(llama(), r=3, lora_alpha=7, target_modules="all-linear")
    before = output(ours, IDS)
    deltaw.merge(ours, original="none")
    deltaw.detach(ours)
    ours.save_pretrained(tmp_path)
    plain = type(llama()).from_pretrained(tmp_path).eval()
    close(output(plain, IDS), before, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_24_unmerging_gives_every_bit_back(kind: str, dtype: torch.dtype) -> None:
    base, _, targets = case(kind)
    ours = with_deltaw(base.to(dtype), r=3, lora_alpha=7, target_modules=targets)
    before = weights(ours)
    for _ in range(3):
        deltaw.merge(ours)
        assert any(not torch.equal(t, before[n]) for n, t in weights(ours).items())
        deltaw.unmerge(ours)
        equal(weights(ours), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_27_what_is_not_finite_is_not_merged(bad: float, tmp_path: Path) -> None:
    base = seeded(Mlp)
    ours = with_deltaw(base, r=3, target_modules=TARGETS)
    before = weights(ours)
    ours.body["lin"].adapter["default"]["weight"].lora_B.data[1, 1] = bad
    with pytest.raises(MergeError, match=r"body\.lin"):
        deltaw.merge(ours)
    equal(weights(ours), before)
    with pytest.raises(FormatError, match="NaN or Inf"):
        deltaw.save(ours, tmp_path)
    theirs = with_peft(base, r=3, target_modules=TARGETS)
    theirs.base_model.model.lin.lora_A["default"].weight.data[0, 0] = bad
    with pytest.raises(FormatError, match=r"lin\.lora_A\.weight' has 1 NaN or Inf"):
        loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path))


def test_28_two_active_adapters_add_up(two: tuple) -> None:
    theirs, ours, folders, base = two
    with quiet():
        theirs.base_model.set_adapter(["a", "b"])
    deltaw.activate(ours, {"a": 1.0, "b": 1.0})
    close(output(theirs, X), output(ours, X))
    expected = copy.deepcopy(base)
    for name, factor in (("a", 7 / 3), ("b", 5 / 2**0.5)):
        file = tensors(folders[name])
        for path in ("lin", "body.lin", "body.out"):
            key = f"base_model.model.{path}.lora_"
            if key + "A.weight" in file:
                delta = factor * file[key + "B.weight"] @ file[key + "A.weight"]
                expected.get_submodule(path).weight.data += delta
    close(output(expected, X), output(ours, X))


def test_29_switching_gives_what_each_gives_alone(two: tuple) -> None:
    theirs, ours, folders, base = two
    for name in ("b", "a", "b"):
        with quiet():
            theirs.set_adapter(name)
        deltaw.activate(ours, name)
        close(output(theirs, X), output(ours, X))
        assert torch.equal(output(ours, X), output(loaded_by_deltaw(base, folders[name]), X))


def test_30_disabling_gives_the_base_and_comes_back(two: tuple) -> None:
    theirs, ours, _, base = two
    adapted = output(ours, X)
    with theirs.disable_adapter(), deltaw.disabled(ours):
        assert torch.equal(output(ours, X), output(base, X))
        assert torch.equal(output(theirs, X), output(ours, X))
        with deltaw.disabled(ours):
            pass
        assert torch.equal(output(ours, X), output(base, X))
    assert torch.equal(output(ours, X), adapted)
    with pytest.raises(KeyError), deltaw.disabled(ours):
        raise KeyError
    assert torch.equal(output(ours, X), adapted)


def test_31_every_row_of_a_mixed_batch_is_that_of_its_adapter(two: tuple) -> None:
    theirs, ours, _, _ = two
    rows = ["a", "b", "__base__", "a", "b", "__base__", "a", "b"]
    with torch.no_grad():
        mixed = theirs(X, adapter_names=rows)
    for index, name in enumerate(rows):
        deltaw.activate(ours, None if name == "__base__" else name)
        close(mixed[index], output(ours, X)[index])


def test_32_deleting_leaves_no_trace_and_the_others_as_they_were(two: tuple) -> None:
    theirs, ours, folders, base = two
    with quiet():
        theirs.delete_adapter("a")
        theirs.set_adapter("b")
    deltaw.detach(ours, "a")
    deltaw.activate(ours, "b")
    close(output(theirs, X), output(ours, X))
    alone = loaded_by_deltaw(base, folders["b"], "b")
    equal(dict(ours.state_dict()), dict(alone.state_dict()))
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in alone.named_modules()]
    assert list(deltaw.configs(ours)) == ["b"]


def test_33_unloading_gives_the_original_model(two: tuple) -> None:
    theirs, ours, _, base = two
    deltaw.detach(ours)
    assert type(ours) is Mlp and type(ours.lin) is nn.Linear
    assert not [m for m in ours.modules() if type(m).__module__.startswith("deltaw")]
    equal(dict(ours.state_dict()), dict(base.state_dict()))
    assert all(p.requires_grad for p in ours.parameters())
    with quiet():
        equal(dict(theirs.unload().state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"modules_to_save": ["head"]}],
)
def test_35_one_adapter_under_weight_one_is_itself(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = seeded(Mlp)
    theirs = with_peft(base, r=3, lora_alpha=7, target_modules=TARGETS, **settings)
    ours = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path))
    before = output(ours, X)
    deltaw.activate(ours, {"default": 1.0})
    assert torch.equal(output(ours, X), before)
    close(output(theirs, X), before)


@pytest.mark.parametrize("pair", [(0.5, 2.0), (1.0, -1.0), (-0.3, 0.0), (0.25, 0.75)])
def test_35_a_weighted_sum_is_that_of_the_deltas(pair: tuple[float, float], two: tuple) -> None:
    theirs, ours, folders, base = two
    deltaw.activate(ours, dict(zip("ab", pair, strict=True)))
    expected = copy.deepcopy(base)
    for name, weight in zip("ab", pair, strict=True):
        one = loaded_by_deltaw(base, folders[name])
        deltaw.merge(one)
        for path in ("lin", "body.lin", "body.out"):
            delta = one.get_submodule(path).weight - base.get_submodule(path).weight
            expected.get_submodule(path).weight.data += weight * delta.detach()
    close(output(ours, X), output(expected, X))
    if all(weight > 0 for weight in pair):
        # PEFT's own "cat" is right where neither adapter is an rsLoRA one.
        with quiet():
            theirs.peft_config["b"].use_rslora = False
            theirs.base_model.model.lin.scaling["b"] = 5 / 2**0.5
            theirs.add_weighted_adapter(["a", "b"], list(pair), "sum", combination_type="cat")
            theirs.set_adapter("sum")
        close(output(theirs, X), output(ours, X))


def test_40_swapping_equals_a_fresh_load(two: tuple) -> None:
    theirs, ours, folders, base = two
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    del theirs
    deltaw.detach(ours, "b")
    keys = [name for name in ours.state_dict() if ".adapter." not in name]
    deltaw.load(ours, folders["b"], "a", swap=True)
    fresh = loaded_by_deltaw(base, folders["b"])
    assert torch.equal(output(ours, X), output(fresh, X))
    assert [name for name in ours.state_dict() if ".adapter." not in name] == keys
    # PEFT swaps to fewer layers, of another rank and alpha, only after this preparation.
    model = loaded_by_peft(base, folders["a"])
    with quiet():
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    config = model.peft_config["default"]
    config.use_rslora = True  # PEFT refuses to swap where this differs
    hotswap_adapter(model, str(folders["b"]), "default")
    with quiet():
        alone = loaded_by_peft(base, folders["b"])
    close(output(alone, X), output(ours, X))


def test_40_layers_that_are_missing_count_as_zero(two: tuple) -> None:
    _, ours, folders, base = two
    deltaw.detach(ours, "b")
    deltaw.load(ours, folders["b"], "a", swap=True)
    inner = loaded_by_deltaw(base, folders["b"])
    assert "adapter" not in ours.body["out"]._modules
    assert torch.equal(output(ours, X), output(inner, X))
    deltaw.load(ours, folders["a"], "a", swap=True)
    assert torch.equal(output(ours, X), output(loaded_by_deltaw(base, folders["a"]), X))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"out": 5}, "alpha_pattern": {"^lin": 2}}]
)
def test_41_a_rescaled_adapter(factor: float, patterns: dict[str, object], tmp_path: Path) -> None:
    base = seeded(Mlp)
    theirs = with_peft(base, r=3, lora_alpha=7, target_modules=TARGETS, **patterns)
    ours = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path))
    before = output(ours, X)
    deltaw.activate(ours, {"default": factor})
    with peft.helpers.rescale_adapter_scale(theirs, factor):
        close(output(theirs, X), output(ours, X))
    if factor == 0:
        assert torch.equal(output(ours, X), output(base, X))
    if factor == 1:
        assert torch.equal(output(ours, X), before)


def error(model: nn.Module, x: object, exact: Tensor) -> float:
    return float((output(model, x).float() - exact).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_43_half_precision_bases(
    kind: str, autocast: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Errors against float32 throughout, in which PEFT alone computes float32 adapters."""
    base, x, targets = case(kind)
    half = copy.deepcopy(base).to(dtype)
    with quiet():
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets)
        theirs = peft.get_peft_model(copy.deepcopy(half), config, autocast_adapter_dtype=autocast)
    written = saved_by_peft(randomise(theirs), tmp_path / "theirs")
    stored = {tensor.dtype for tensor in tensors(written).values()}
    assert stored == {torch.float32 if autocast else dtype}
    exact = output(loaded_by_deltaw(copy.deepcopy(half).float(), written), x)
    x = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    ours = loaded_by_deltaw(half, written)
    assert output(ours, x).dtype == dtype
    limit = 3 * error(theirs, x, exact) + 1e-3 * float(exact.square().mean().sqrt())
    assert error(ours, x, exact) <= limit
    assert error(half, x, exact) > 2 * limit
    again = tensors(saved_by_deltaw(ours, tmp_path / "ours"))
    for name, tensor in tensors(written).items():
        assert torch.equal(again[name].to(tensor.dtype), tensor)
    assert error(loaded_by_peft(half, tmp_path / "ours"), x, exact) <= limit
