"""Merging under PEFT's names: the calls follow each other in any order, as with PEFT."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from peft_scripts import IDS, fill, gpt2
from torch import Tensor, nn

import deltaw
from deltaw.compat import peft as ours
from deltaw.errors import MergeError, StateError

theirs = pytest.importorskip("peft")

BASE = gpt2().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["peft", "deltaw"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Two adapters, `a` active, under PEFT and under deltaw."""
    library = theirs if request.param == "peft" else ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = library.get_peft_model(
            gpt2(), library.LoraConfig(r=2, target_modules=["c_attn"]), "a"
        )
        made.add_adapter("b", library.LoraConfig(r=3, target_modules=["c_attn"]))
        fill(made)
        made.set_adapter("b")
        fill(made)
        made.set_adapter("a")
        yield made.eval()


def test_merged_adapters_are_merged_for_good_and_unloaded(model: nn.Module) -> None:
    adapted = output(model)
    model.merge_adapter()
    plain = model.merge_and_unload()
    assert not any("lora" in name for name in plain.state_dict())
    close(output(plain), adapted)


def test_a_second_merge_of_the_same_changes_nothing(model: nn.Module) -> None:
    adapted = output(model)
    model.merge_adapter()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.unmerge_adapter()
    close(output(model), adapted)
    with pytest.warns(UserWarning, match=r"unmerged|No adapter is merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("finish", ["merge_adapter", "merge_and_unload"])
def test_merges_add_up_and_leave_active_what_was(model: nn.Module, finish: str) -> None:
    adapted = output(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["a", "b"])
    model.merge_adapter()
    result = getattr(model, finish)(adapter_names=["b"]) or model
    close(output(result), output(merged))
    if finish == "merge_adapter":
        model.unmerge_adapter()
        close(output(model), adapted)
        assert model.active_adapter == "a"


def test_disabling_merged_adapters_gives_the_base(model: nn.Module) -> None:
    adapted = output(model)
    model.merge_adapter()
    with model.disable_adapter():
        close(output(model), output(BASE))
    close(output(model), adapted)


def test_setting_an_adapter_unmerges(model: nn.Module) -> None:
    adapted = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.set_adapter("b")
    other = output(model)
    model.set_adapter("a")
    close(output(model), adapted)
    assert not torch.allclose(other, adapted, atol=1e-3)


def tied() -> nn.Module:
    config = ours.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    return ours.get_peft_model(gpt2(), config).eval()


@pytest.mark.parametrize("merge", [ours.PeftModel.merge_adapter, ours.PeftModel.merge_and_unload])
def test_a_tied_weight_is_refused_with_an_option_that_is_there(
    merge: Callable[..., nn.Module | None],
) -> None:
    model = tied()
    adapted = output(model)
    with pytest.raises(MergeError, match=r"wte\.weight is tied to .*pass untie=True"):
        merge(model)
    assert torch.equal(output(model), adapted)
    merge(model, untie=True)
    close(output(model), adapted)


def test_a_merge_that_is_refused_leaves_merged_what_was() -> None:
    model = tied()
    model.add_adapter("b", ours.LoraConfig(r=2, target_modules=["c_attn"]))
    model.set_adapter("b")
    model.merge_adapter()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError, match="is tied"):
        model.merge_and_unload(adapter_names=["default"])
    with pytest.raises(StateError, match="there is no adapter 'c'"):
        model.merge_adapter(["c"])
    assert model.authority.merged == (("b", 1.0),) and deltaw.active(model) == {"b": 1.0}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
