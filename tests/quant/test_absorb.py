"""Starts taken out of W before it is packed (QPiSSA, LoftQ): errors, bits, files and refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant.packed_models import BNB, KINDS, batch, bnb, dense, net, over
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.absorbing import Absorption
from deltaw.errors import ConfigError, StateError
from deltaw.quant import kinds, storage_of

SETTINGS = {"r": 8, "lora_alpha": 5, "target_modules": ["up", "down"]}
SCALE = 5 / 8
SLACK = {"int8": 3e-2}
"""LLM.int8() rounds the input to 8 bits."""
INITS = ("pissa", "milora", "olora", "loftq", "loftq_iter_3")


def absorbed(kind: str | bool, init: str = "pissa", model: nn.Module | None = None) -> nn.Module:
    model = net() if model is None else model
    config = deltaw.LoraConfig(**SETTINGS, init_lora_weights=init)
    deltaw.attach(model, config, generator=torch.Generator().manual_seed(0), absorb=kind)
    return model


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Move A and B from where they started."""
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def product(model: nn.Module, path: str, tensor: str = "lora") -> Tensor:
    """s B A of one layer, in float64."""
    at = deltaw.capture(model).layers[path].tensors
    return SCALE * at[f"weight.{tensor}_B"].double() @ at[f"weight.{tensor}_A"].double()


def error(model: nn.Module, path: str) -> float:
    """‖W - (Q + s B A)‖."""
    W = net().get_submodule(path).weight.detach().double()
    return float((W - dense(model.get_submodule(path)).double() - product(model, path)).norm())


def plain_error(kind: str, path: str) -> float:
    W = net().get_submodule(path).weight.detach().double()
    return float((W - dense(net(kind).get_submodule(path)).double()).norm())


@over(*KINDS)
@pytest.mark.parametrize("init", INITS)
def test_what_is_packed_is_w_less_the_start(kind: str, init: str) -> None:
    model = absorbed(kind, init)
    for path in ("up", "down"):
        layer = model.get_submodule(path)
        assert storage_of(layer) is kinds()[kind]
        W = net().get_submodule(path).weight.detach().double()
        rest = nn.Linear(*W.shape[::-1], bias=False)
        rest.weight.data = (W - product(model, path, "start")).float()
        kinds()[kind].pack(rest, kind, True)
        # a last bit of the difference may tip a value to the next step of the code
        assert (dense(layer) - dense(rest)).abs().gt(1e-6).float().mean() < 1e-2
    assert type(model.last) is nn.Linear


@over(*KINDS)
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_forward_is_that_of_plain_lora_on_it(kind: str, init: str) -> None:
    model = moved(absorbed(kind, init))
    x = batch().requires_grad_()
    y = model.up(x)
    W = (dense(model.up).double() + product(model, "up")).requires_grad_()
    wide = x.detach().double().requires_grad_()
    z = F.linear(wide, W, model.up.bias.double())
    slack = max(SLACK.get(kind, 0), 2e-5)
    assert (y - z).abs().max() <= slack * z.abs().max()
    (y.square().sum() / 2).backward()
    (z.square().sum() / 2).backward()
    A, B = (getattr(model.up.adapter["default"].weight, f"lora_{n}") for n in "AB")
    assert W.grad is not None and wide.grad is not None
    for ours, theirs in (
        (x.grad, wide.grad),
        (A.grad, SCALE * B.detach().double().T @ W.grad),
        (B.grad, SCALE * W.grad @ A.detach().double().T),
    ):
        assert (ours - theirs).abs().max() <= slack * theirs.abs().max()


@over(*KINDS)
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_dora_measures_what_is_left_and_the_start_together(kind: str, init: str) -> None:
    """W' = m V / ‖V‖ with V = Q + s B A, and m = ‖W‖ of the base at the start."""
    model = net()
    config = deltaw.LoraConfig(**SETTINGS, init_lora_weights=init, use_dora=True)
    deltaw.attach(model, config, generator=torch.Generator().manual_seed(0), absorb=kind)
    m = deltaw.capture(model).layers["up"].tensors["weight.lora_magnitude_vector"].double()
    assert torch.allclose(m, net().up.weight.double().norm(dim=1), rtol=1e-6)
    moved(model)
    m = deltaw.capture(model).layers["up"].tensors["weight.lora_magnitude_vector"].double()
    V = dense(model.up).double() + product(model, "up")
    x = batch().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = model.up(x)
    z = F.linear(wide, m[:, None] * V / V.norm(dim=1, keepdim=True), model.up.bias.double())
    slack = max(SLACK.get(kind, 0), 2e-5)
    assert (y - z).abs().max() <= slack * z.abs().max()
    y.square().sum().backward()
    z.square().sum().backward()
    assert (x.grad - wide.grad).abs().max() <= slack * wide.grad.abs().max()


@over(*KINDS)
@pytest.mark.parametrize("init", ["loftq", "loftq_iter_3"])
def test_less_is_lost_than_by_packing_w(kind: str, init: str) -> None:
    model = absorbed(kind, init)
    for path in ("up", "down"):
        assert error(model, path) < plain_error(kind, path)


@over("nf4", "fp4")
@pytest.mark.parametrize("decay", [0.2, 0.5])
def test_qpissa_loses_less_than_qlora(kind: str, decay: float) -> None:
    """Of weights whose spectrum decays; its principal part is not rounded (paper, section 4)."""
    W = torch.randn(128, 192) @ torch.diag(torch.arange(1.0, 193) ** -decay)
    errors = []
    for init in (True, "pissa"):
        model = nn.Sequential(nn.Linear(192, 128, bias=False))
        model[0].weight.data = W.clone()
        config = deltaw.LoraConfig(r=8, target_modules=["0"], init_lora_weights=init)
        if init is True:
            deltaw.quantize(model, kind)
        deltaw.attach(model, config, absorb=kind if init == "pissa" else False)
        at = deltaw.capture(model).layers["0"].tensors
        BA = 2 * at["weight.lora_B"].double() @ at["weight.lora_A"].double()
        errors.append(float((W.double() - dense(model[0]).double() - BA).norm()))
    assert errors[1] < 0.97 * errors[0]


@bnb
def test_loftq_goes_on_from_turn_to_turn() -> None:
    errors = [error(absorbed("nf4", f"loftq_iter_{n}"), "up") for n in (1, 2, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert error(absorbed("nf4", "loftq"), "up") == errors[0]


@bnb
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_loftq_loses_no_more_than_pefts(
    turns: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own function, made to run on a CPU; its scales are not packed and ours are."""
    utils = pytest.importorskip("peft.utils.loftq_utils")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind in (Tensor, bitsandbytes.nn.Params4bit):
        monkeypatch.setattr(kind, "to", _on_cpu(kind.to))
    W = torch.randn(128, 192) @ torch.diag(torch.arange(1.0, 193) ** -decay)
    Q, A, B = utils.loftq_init(W, num_bits=4, reduced_rank=4, num_iter=turns)
    theirs = float((W.double() - Q.double() - B.double() @ A.double()).norm())
    model = nn.Sequential(nn.Linear(192, 128, bias=False))
    model[0].weight.data = W.clone()
    init = f"loftq_iter_{turns}"
    config = deltaw.LoraConfig(r=4, lora_alpha=3, target_modules=["0"], init_lora_weights=init)
    deltaw.attach(model, config, absorb="nf4")
    at = deltaw.capture(model).layers["0"].tensors
    BA = at["weight.lora_B"].double() @ at["weight.lora_A"].double() * 0.75
    ours = float((W.double() - dense(model[0]).double() - BA).norm())
    assert ours <= theirs


def _on_cpu(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.to` that stays where it is when a GPU is asked for."""

    def there(self: Tensor, *args: object, **options: object) -> Tensor:
        args = tuple("cpu" if a == "cuda" else a for a in args)
        options = {n: "cpu" if v == "cuda" else v for n, v in options.items()}
        return to(self, *args, **options)

    return there


@over("nf4", "int8", "torchao-int8")
def test_a_packed_weight_is_packed_again(kind: str) -> None:
    model, before = net(kind), dense(net(kind).up).double()
    absorbed(True, "pissa", model)
    assert storage_of(model.up) is kinds()[kind]
    rest = before - product(model, "up", "start")
    step = rest.abs().amax(1, keepdim=True) * (0.2 if kind == "nf4" else 0.01)
    assert ((dense(model.up).double() - rest).abs() <= step).all()
    assert not torch.equal(dense(model.up).double(), before)


@over(*KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_bits_again(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = moved(absorbed(kind, "pissa", net(dtype=dtype)))
    x = batch(dtype)
    with torch.no_grad():
        y = model(x)
    deltaw.save(model, tmp_path)
    for trainable in (False, True):
        again = net(dtype=dtype)
        deltaw.load(again, tmp_path, absorb=kind, trainable=trainable)
        assert torch.equal(dense(again.up), dense(model.up))
        with torch.no_grad():
            assert torch.equal(again(x), y)
    assert deltaw.capture(again).base == deltaw.capture(model).base
    fresh = net(dtype=dtype)
    deltaw.attach(fresh, deltaw.capture(model), absorb=kind)
    with torch.no_grad():
        assert torch.equal(fresh(x), y)


@bnb
def test_plain_peft_reads_it_on_the_base_as_it_was(tmp_path: Path) -> None:
    """Its output differs by the rounding of the packed weights alone; of dense ones not at all."""
    peft = pytest.importorskip("peft")
    for kind, tolerance in ((True, 1e-5), ("nf4", 0.2)):
        model = moved(absorbed(kind))
        deltaw.save(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
        with torch.no_grad():
            y, z = model(batch()), theirs(batch())
        assert (y - z).norm() <= tolerance * z.norm()


@bnb
def test_the_rest_is_packed_afterwards() -> None:
    model = absorbed("nf4")
    bits = model.up.weight.data.clone()
    assert deltaw.quantize(model, "fp4", double_quantization=False) == ("last",)
    assert torch.equal(model.up.weight.data, bits)
    deltaw.verify(model, batch())
    y = model(batch()).detach()
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    assert type(model.up) is nn.Linear and storage_of(model.last) is not None
    assert model.up.weight.requires_grad and not model.last.weight.requires_grad
    torch.testing.assert_close(model(batch()), y, rtol=1e-5, atol=1e-5)


@over(*BNB)
def test_merging_again_and_back(kind: str) -> None:
    model = moved(absorbed(kind))
    before, y = dense(model.up), model(batch()).detach()
    W = (before.double() + product(model, "up")).float()
    deltaw.merge(model)
    torch.testing.assert_close(model.up.weight, W, rtol=1e-6, atol=1e-6)
    deltaw.unmerge(model)
    assert torch.equal(dense(model.up), before)
    assert torch.equal(model(batch()), y)


# ---------------------------------------------------------------- refusals


def unchanged(model: nn.Module, absorb: object, *texts: str, **settings: object) -> None:
    """One error that says all of it, and the model is as it was."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    kinds_ = {path: type(m) for path, m in model.named_modules()}
    values = {**SETTINGS, "init_lora_weights": "pissa", **settings}
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
    deltaw.attach(model, deltaw.LoraConfig(**SETTINGS))
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
    unchanged(net("nf4"), False, text)


def test_other_adapters_need_the_base() -> None:
    model = net()
    deltaw.attach(model, deltaw.LoraConfig(**SETTINGS))
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
