"""Starts taken out of W before it is packed (QPiSSA, LoftQ): errors, bits, files and refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant.packed_models import ABSORBED, BNB, KINDS, absorbed, batch, bnb, dense, net, over
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.quant import kinds, storage_of

SCALE = 5 / 8
SLACK = {"int8": 3e-2}
"""LLM.int8() rounds the input to 8 bits."""
INITS = ("pissa", "milora", "olora", "loftq", "loftq_iter_3")


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
    config = deltaw.LoraConfig(**ABSORBED, init_lora_weights=init, use_dora=True)
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
    assert ours <= 1.005 * theirs  # packing answers in steps: whole SVDs end within this too


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
