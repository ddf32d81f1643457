"""`add_weighted_adapter` under PEFT's names, against Σ wᵢ ΔWᵢ and, where PEFT is right, PEFT."""

import warnings

import pytest
import torch
from peft_scripts import IDS, fill, gpt2
from torch import Tensor, nn

import deltaw
from deltaw.compat import peft as ours
from deltaw.errors import ConfigError, MergeError, StateError

theirs = pytest.importorskip("peft")

WEIGHTS = [0.7, -1.3]
KINDS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def two(library: object, **second: object) -> nn.Module:
    """Adapters `a` and `b`, of unequal ranks and alphas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = library.LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn"])
        made = library.get_peft_model(gpt2(), first, "a")
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"], **second}
        made.add_adapter("b", library.LoraConfig(**settings))
        for name in ("b", "a"):
            made.set_adapter(name)
            fill(made)
    return made.eval()


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    layers = deltaw.capture(model, name).layers
    return {
        path: own.scale
        * own.tensors["weight.lora_B"].double()
        @ own.tensors["weight.lora_A"].double()
        for path, own in layers.items()
    }


def summed(model: nn.Module) -> dict[str, Tensor]:
    a, b = deltas(model, "a"), deltas(model, "b")
    return {path: WEIGHTS[0] * a[path] + WEIGHTS[1] * b[path] for path in a}


@pytest.mark.parametrize(("kind", "rank"), [("cat", 5), ("linear", 5), ("svd", 3)])
@pytest.mark.parametrize("root", [False, True])
def test_sums_are_those_of_delta_w(kind: str, rank: int, root: bool) -> None:
    model = two(ours, use_rslora=root)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", kind)
    assert model.peft_config["c"].r == model.peft_config["c"].lora_alpha == rank
    for path, expected in summed(model).items():
        U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(deltas(model, "c")[path], best, rtol=1e-5, atol=1e-5)


def test_adapters_of_one_model_need_not_name_one_base() -> None:
    """Of other layers, so that no fingerprint tells; the first name is that of the sum."""
    model = two(ours)
    for name, base, path in (("d", "org/model", "c_attn"), ("e", "mirror/copy", "c_fc")):
        named = {"target_modules": [path], "base_model_name_or_path": base}
        model.add_adapter(name, ours.LoraConfig(r=2, **named))
    model.add_weighted_adapter(["d", "e"], WEIGHTS, "c", "cat")
    assert model.peft_config["c"].base_model_name_or_path == "org/model"


@pytest.mark.parametrize("dora", [False, True])
def test_the_new_adapter_waits_and_is_frozen(dora: bool) -> None:
    """Its output is that of both together; DoRA takes the weights at hand."""
    model = two(ours, use_dora=dora)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "cat")
    assert model.active_adapters == ["a"]
    assert not [n for n, p in model.named_parameters() if ".adapter.c." in n and p.requires_grad]
    model.set_adapter("c")
    with torch.no_grad():
        combined = model(input_ids=IDS).logits
        deltaw.activate(model, dict(zip("ab", WEIGHTS, strict=True)))
        together = model(input_ids=IDS).logits
    torch.testing.assert_close(combined, together, rtol=1e-4, atol=1e-4)


def test_where_peft_is_right_it_gives_the_same() -> None:
    outputs = []
    for library in (theirs, ours):
        model = two(library)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "cat")
            model.set_adapter("c")
        with torch.no_grad():
            outputs.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_and_their_svd_twins_are_the_same(kind: str) -> None:
    model = two(ours)
    for name, own in {"c": kind, "d": f"{kind}_svd"}.items():
        torch.manual_seed(3)
        model.add_weighted_adapter(["a", "b"], WEIGHTS, name, own, svd_rank=4, density=0.5)
    assert model.peft_config["c"].r == 4
    for path, expected in deltas(model, "c").items():
        torch.testing.assert_close(deltas(model, "d")[path], expected)
        assert not torch.allclose(expected, summed(model)[path], atol=1e-2)


def test_what_is_not_supported_or_absent_is_refused() -> None:
    model = two(ours)
    with pytest.raises(ConfigError, match="svd_clamp is not supported"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", svd_clamp=0.9)
    with pytest.raises(ConfigError, match="combination_type must be one of linear, cat, svd"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "mean")
    with pytest.raises(ConfigError, match="ties needs a density"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "ties")
    with pytest.raises(StateError, match="no adapter 'x'"):
        model.add_weighted_adapter(["a", "x"], WEIGHTS, "c")
    with pytest.raises(StateError, match="'a'"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "a")
    assert list(model.peft_config) == ["a", "b"]


def test_full_copies_need_weights_that_sum_to_one() -> None:
    model = two(ours, modules_to_save=["lm_head"])
    with pytest.raises(MergeError, match=r"lm_head\.weight: -1\.3"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "c")
    model.add_weighted_adapter(["a", "b"], [0.5, 1.0], "c")
