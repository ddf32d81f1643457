"""What keeps a start from going into W, and what an absorbed one keeps from the base."""

from pathlib import Path

import pytest
import torch
from quant.packed_models import ABSORBED, absorbed, batch, bnb, dense, net
from torch import nn

import deltaw
from deltaw.absorbing import Absorption
from deltaw.errors import ConfigError, StateError
from deltaw.quant import storage_of


def unchanged(model: nn.Module, absorb: object, *texts: str, **settings: object) -> None:
    """One error that says all of it, and the model is as it was."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    kinds_ = {path: type(m) for path, m in model.named_modules()}
    values = {**ABSORBED, "init_lora_weights": "pissa", **settings}
    with pytest.raises(ConfigError) as problem:
        deltaw.attach(model, deltaw.LoraConfig(**values), "other", absorb=absorb)
    for text in (*texts, "Fix: "):
        assert text in str(problem.value)
    assert {path: type(m) for path, m in model.named_modules()} == kinds_
    for name, p in model.named_parameters():
        assert p is before[name][0]
        if not p.is_meta and storage_of(model.get_submodule(name.rpartition(".")[0])) is None:
            assert torch.equal(p, before[name][1])


@bnb
@pytest.mark.parametrize("absorb", [True, "nf4"])
@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_nothing_to_absorb(absorb: bool | str, init: bool | str) -> None:
    text = f"absorb={absorb!r} has no effect with init_lora_weights={init!r}"
    unchanged(net(), absorb, text, init_lora_weights=init)


def test_a_state_without_a_start() -> None:
    model = net()
    deltaw.attach(model, deltaw.LoraConfig(**ABSORBED))
    with pytest.raises(ConfigError, match="absorb=True has no effect with this state"):
        deltaw.attach(net(), deltaw.capture(model), absorb=True)


def test_no_such_way() -> None:
    unchanged(net(), "nf5", "There is no way called 'nf5'")
    with pytest.raises(ConfigError, match="absorb must be True, False or a kind"):
        deltaw.attach(net(), deltaw.LoraConfig(), absorb=4)


@pytest.mark.parametrize("absorb", [False, True])
def test_loftq_needs_to_know_the_packing(absorb: bool) -> None:
    unchanged(net(), absorb, "init_lora_weights='loftq' makes up for", init_lora_weights="loftq")


@bnb
def test_all_that_stands_in_the_way_is_listed() -> None:
    model = net()
    model.tied = nn.Linear(64, 128)
    model.tied.weight = model.up.weight
    model.down = nn.Linear(128, 32, device="meta")
    texts = [
        "up: weight is tied to tied.weight",
        "down: weight is on the meta device",
        "last: its input has an odd width",
    ]
    model.last = nn.Linear(33, 5)
    settings = {"target_modules": ["up", "down", "last"], "r": 2}
    unchanged(model, "nf4", *texts, **settings)


@bnb
def test_layers_that_are_no_plain_linear_ones() -> None:
    class Own(nn.Linear):
        """A subclass."""

    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "own": Own(16, 16)})
    texts = ["embed: nf4 packs plain linear layers", "own: nf4 packs plain linear layers"]
    unchanged(model, "nf4", *texts, target_modules=["embed", "own"])


@bnb
def test_packed_weights_say_how_they_start() -> None:
    text = "up: its weight is packed already, as Bnb4; load it in full precision, or use absorb"
    unchanged(net("nf4"), "nf4", text)
    text = "up: its weight is packed, as Bnb4; pack the rest of W once the start is taken out of it"
    fix = "Fix: take them out with exclude_modules, or use init_lora_weights=True."
    unchanged(net("nf4"), False, text, fix)


def test_other_adapters_need_the_base() -> None:
    model = net()
    deltaw.attach(model, deltaw.LoraConfig(**ABSORBED))
    unchanged(model, True, "the model has adapters (default)")


def test_a_table_with_max_norm() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16, max_norm=1.0)})
    unchanged(model, True, "embed: max_norm would renormalise", target_modules=["embed"])


def test_a_residual_that_does_not_fit_the_dtype() -> None:
    start = deltaw.capture(absorbed(True))
    layers = {
        path: deltaw.LayerState(at.kind, {n: 300 * t for n, t in at.tensors.items()}, 10 * at.scale)
        for path, at in start.layers.items()
    }
    model = net(dtype=torch.float16)
    before = model.up.weight.detach().clone()
    with pytest.raises(ConfigError) as problem:
        deltaw.attach(model, deltaw.State(start.config, layers), absorb=True)
    assert "up.weight would hold NaN or Inf" in str(problem.value)
    assert "down.weight would hold NaN or Inf" in str(problem.value)
    assert torch.equal(model.up.weight, before) and type(model.up) is nn.Linear


def test_a_weight_that_torchao_packs_in_another_way() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model.up, dynamic)
    text = "cannot be unpacked and packed again"
    unchanged(model, True, text, target_modules=["up"])


ON_THE_BASE = {
    "detach": deltaw.detach,
    "disabled": lambda model: deltaw.disabled(model).__enter__(),
    "none": lambda model: deltaw.activate(model, None),
    "sum": lambda model: deltaw.activate(model, {"default": 0.5}),
    "rows": lambda model: deltaw.rows(model, ["default", None]).__enter__(),
    "attach": lambda model: deltaw.attach(model, deltaw.LoraConfig(), "other"),
    "base": lambda model: model.load_state_dict(net().state_dict()),
}


@pytest.mark.parametrize("verb", ON_THE_BASE)
def test_what_needs_the_base(verb: str) -> None:
    model = absorbed(True)
    y, W = model(batch()), model.up.weight.detach().clone()
    with pytest.raises(StateError, match=r"absorbed into the weights(.|\n)*Fix: load the base"):
        ON_THE_BASE[verb](model)
    deltaw.activate(model, "default")
    assert torch.equal(model(batch()), y) and torch.equal(model.up.weight, W)


def test_files_that_come_in_place(tmp_path: Path) -> None:
    model = absorbed(True)
    deltaw.save(model, tmp_path)
    with pytest.raises(StateError, match="Cannot swap an adapter"):
        deltaw.load(model, tmp_path, swap=True)
    for options in ({"reserve": 8}, {"dtype": torch.bfloat16}):
        with pytest.raises(ConfigError, match="leave out swap, reserve and dtype"):
            deltaw.load(net(), tmp_path, absorb=True, **options)


def test_detaching_while_merged_waits_for_unmerge() -> None:
    model = absorbed(True)
    deltaw.merge(model)
    with pytest.raises(StateError, match=r"call deltaw\.unmerge"):
        deltaw.detach(model)
    deltaw.unmerge(model)


def test_a_site_packs_what_it_is_given() -> None:
    W = net().up.weight.detach()
    assert Absorption("").rounded(torch.float32, W) is W


def test_slices_of_a_fused_weight() -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 96)})
    settings = {"target_modules": ["up"], "enable_lora": {"up": [True, False, True]}, "r": 2}
    text = "up slice_0_of_3: a slice of a fused weight is not packed on its own"
    pytest.importorskip("bitsandbytes")
    unchanged(model, "nf4", text, init_lora_weights="loftq", **settings)
    config = deltaw.LoraConfig(**settings, init_lora_weights="pissa")
    W = model["up"].weight.detach().double()
    deltaw.attach(model, config, absorb="nf4")
    at = deltaw.capture(model).layers["up"].tensors
    s = config.scale(2, 4)
    start = torch.cat(
        [
            s * at[f"slice_{i}.start_B"].double() @ at[f"slice_{i}.start_A"].double()
            if i != 1
            else torch.zeros(32, 64, dtype=torch.float64)
            for i in range(3)
        ]
    )
    step = 0.16 * float((W - start).abs().max())
    assert (dense(model["up"]).double() - (W - start)).abs().max() <= step
