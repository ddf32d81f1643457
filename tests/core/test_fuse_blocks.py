"""Blocks that keep less: same output bit for bit, same gradients, fewer bytes."""

import copy
import pickle

import pytest
import torch
from core.models import shake
from core.test_fuse_loss import SMALL, assert_close, batch, result
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import deltaw
from deltaw.blocks import LeanMLP, LeanNorm
from deltaw.errors import TargetError
from deltaw.kernels.gated import gated
from deltaw.kernels.rms_norm import rms_norm

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

REMAKE = pytest.mark.parametrize("remake", [False, True], ids=["keep", "remake"])


def llama(dtype: torch.dtype = torch.float32, p: float = 0.0, act: str = "silu", **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act=act, **options))
    for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        nn.init.normal_(norm.weight, 1.0, 0.3)
    model = model.to(dtype)
    deltaw.attach(model, deltaw.LoraConfig(r=3, lora_alpha=5, lora_dropout=p))
    shake(model, 0.2)
    return model.train()


@REMAKE
@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)],
    ids=str,
)
def test_outputs_and_gradients(remake, act, p, dtype, tolerance) -> None:
    found = []
    for lean in (False, True):
        model = llama(dtype, p, act)
        if lean:
            taken = deltaw.fuse_blocks(model, remake=remake)
            assert str(taken) == "5 norms and 2 gated MLPs keep less"
        torch.manual_seed(4)
        output = model(**batch())
        held = [q for q in model.parameters() if q.requires_grad]
        found.append((output.logits, torch.autograd.grad(output.loss, held)))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[1][1], found[0][1], tolerance)


def saved(model: nn.Module) -> int:
    """The bytes kept for the backward pass of the blocks, parameters aside."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with saved_tensors_hooks(lambda t: alive.append(t) or pack(t), lambda t: t):
        model.model(input_ids=batch()["input_ids"])
    return sum(kept.values())


def test_fewer_bytes_are_kept() -> None:
    """Below what the frozen model alone keeps; without adapters, exactly what is said."""
    base = llama(torch.bfloat16)
    adapted = saved(base)
    deltaw.fuse_blocks(base)
    lean = saved(base)
    deltaw.detach(base)
    leaner = llama(torch.bfloat16)
    deltaw.fuse_blocks(leaner, remake=True)
    frozen = LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16().requires_grad_(False)
    frozen.enable_input_require_grads()
    floor = saved(frozen)
    assert saved(leaner) < floor < adapted
    tokens = 33
    # adapters read the outputs of four norms; the first one's input needs no gradient
    norm_outputs, products = 3 * tokens * 24 * 2, 2 * tokens * 40 * 2
    assert lean - saved(leaner) == norm_outputs + products


def test_gradients_in_float32_against_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, requires_grad=True)
    w = torch.randn(7)

    def plain(x: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))

    dy = torch.randn(5, 7)
    expected = torch.autograd.grad(plain(x), x, dy)[0]
    found = torch.autograd.grad(rms_norm(x, w, 1e-3), x, dy)[0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    g, u = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for phi in (nn.SiLU(), nn.GELU(), torch.tanh):
        assert torch.autograd.gradcheck(lambda g, u, phi=phi: gated(g, u, phi), (g, u))


def test_rows_that_lie_apart_in_memory() -> None:
    x = torch.randn(4, 3, 7).transpose(0, 1).requires_grad_()
    w = torch.randn(7)
    dense = x.detach().contiguous().requires_grad_()
    assert torch.equal(rms_norm(x, w, 1e-6), rms_norm(dense, w, 1e-6))
    rms_norm(x, w, 1e-6).square().sum().backward()
    rms_norm(dense, w, 1e-6).square().sum().backward()
    assert torch.equal(x.grad, dense.grad)


@REMAKE
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing(remake: bool, reentrant: bool) -> None:
    model = llama()
    deltaw.fuse_blocks(model, remake=remake)
    expected = result(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(**batch()).loss
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert_close(found, expected[1], 1e-6)


def test_what_computes_something_else_is_left_alone() -> None:
    """Gemma multiplies by 1 + w, in float32; T5's MLPs have other parts."""
    gemma = GemmaForCausalLM(GemmaConfig(**SMALL))
    for norm in (m for m in gemma.modules() if type(m).__name__ == "GemmaRMSNorm"):
        nn.init.normal_(norm.weight, 0.0, 0.3)
    taken = deltaw.fuse_blocks(gemma)
    assert len(taken.norms) == 0 and len(taken.mlps) == 2
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=37, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_heads=3)
    )
    taken = deltaw.fuse_blocks(t5)
    assert not taken.mlps
    with pytest.raises(TargetError, match="no RMSNorm and no gated MLP"):
        deltaw.fuse_blocks(nn.Sequential(nn.Linear(3, 3)))


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    model = llama()
    deltaw.fuse_blocks(model)
    model.model.norm.weight.requires_grad_(True)
    model(**batch()).loss.backward()
    assert model.model.norm.weight.grad.any()


def test_it_can_be_undone_and_survives_copies() -> None:
    model = llama()
    kinds = [type(module) for module in model.modules()]
    lean = deltaw.fuse_blocks(model, remake=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(isinstance(m, (LeanNorm, LeanMLP)) for m in other.modules()) == 7
        assert_close(result(other, **batch())[1], result(model, **batch())[1], 1e-6)
    lean.remove()
    lean.remove()
    assert [type(module) for module in model.modules()] == kinds
    assert not any("remakes" in vars(module) for module in model.modules())


def test_the_base_survives_attach_and_detach() -> None:
    model = llama()
    deltaw.detach(model)
    deltaw.fuse_blocks(model)
    keys = list(model.state_dict())
    deltaw.attach(model, deltaw.LoraConfig(r=2))
    deltaw.detach(model)
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, LeanNorm) for m in model.modules()) == 5


def test_weights_in_another_dtype_than_the_input() -> None:
    """The norm's own promotion stays, as under autocast."""
    for fused in (False, True):
        model = llama()
        if fused:
            deltaw.fuse_blocks(model)
        norm = model.model.norm
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = norm(x.requires_grad_())
        assert y.dtype == torch.float32
    assert isinstance(norm, LeanNorm)


@REMAKE
def test_an_activation_that_returns_its_input(remake: bool) -> None:
    found = []
    for lean in (False, True):
        model = llama(act="linear")
        if lean:
            deltaw.fuse_blocks(model, remake=remake)
        found.append(result(model, **batch()))
    assert abs(found[0][0] - found[1][0]) <= 1e-5
    assert_close(found[1][1], found[0][1], 1e-4)


def test_an_activation_that_trains_is_left_alone() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.PReLU()
    assert not deltaw.fuse_blocks(model).mlps


def test_fusing_twice_and_behind_a_hook() -> None:
    model = llama()
    model.model.norm.forward = model.model.norm.forward
    with pytest.raises(TargetError, match=r"model\.norm\n.*before whatever replaced it"):
        deltaw.fuse_blocks(model)
    del model.model.norm.forward
    deltaw.fuse_blocks(model)
    with pytest.raises(TargetError, match="fused already"):
        deltaw.fuse_blocks(model)
