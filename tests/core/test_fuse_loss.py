"""The loss without logits: value, gradients, what is never made, and where it steps aside."""

import copy
import pickle

import pytest
import torch
from core.models import shake
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import deltaw
from deltaw.errors import StateError, TargetError
from deltaw.fusing import Logits
from deltaw.kernels import cross_entropy
from deltaw.kernels.cross_entropy import linear_cross_entropy

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}


def llama(dtype: torch.dtype = torch.float32, tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tie)).to(dtype)
    deltaw.attach(model, deltaw.LoraConfig(r=3, lora_alpha=5))
    shake(model, 0.2)
    return model.train()


def batch(masked: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 37, (3, 11), generator=generator)
    hidden = torch.rand(ids.shape, generator=generator) < masked
    return {"input_ids": ids, "labels": ids.masked_fill(hidden, -100)}


def result(model: PreTrainedModel, **inputs: object) -> tuple[Tensor, list[Tensor]]:
    loss = model(**inputs).loss
    held = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, held))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": torch.arange(33).view(3, 11)},
    ],
    ids=["mean", "number", "tensor", "shifted"],
)
def test_it_is_the_models_own_loss(dtype: torch.dtype, tolerance: float, more: dict) -> None:
    model = llama(dtype)
    loss, gradients = result(model, **batch(), **more)
    deltaw.fuse_loss(model)
    fused, found = result(model, **batch(), **more)
    assert fused.dtype == torch.float32
    assert abs(fused - loss) <= (1e-5 if dtype == torch.float32 else 1e-3) * loss
    assert_close(found, gradients, tolerance)


def test_tied_heads_and_autocast() -> None:
    model = llama(tie=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = result(model, **batch())
        deltaw.fuse_loss(model)
        fused, found = result(model, **batch())
    assert abs(fused - loss) <= 1e-3 * loss
    assert_close(found, gradients, 3e-2)


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_chunks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", (1, rows))
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 37 * 8 * 2)
    torch.manual_seed(0)
    h = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(37, 5).double(), torch.randn(37).double()
    labels = torch.randint(0, 37, (20,))
    labels[[2, 3, 11]] = -100
    expected = nn.functional.cross_entropy(h @ W.T + b, labels)
    found = linear_cross_entropy(h, W, b, labels, 17)
    assert torch.allclose(found, expected, rtol=1e-12)
    a, b_ = (torch.autograd.grad(2 * loss, h)[0] for loss in (found, expected))
    assert torch.allclose(a, b_, rtol=1e-11, atol=1e-14)


class Shapes(TorchDispatchMode):
    """The most elements that any tensor made within the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return output


def test_no_logits_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a gradient of them, nor one of the head."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", (4, 4))
    h = torch.randn(64, 5, requires_grad=True)
    W = torch.randn(1000, 5)
    with Shapes() as shapes:
        linear_cross_entropy(h, W, None, torch.arange(64), 64).backward()
    assert shapes.most == 1000 * 5


def test_what_is_kept_for_the_backward_pass() -> None:
    """The gradient of the labelled rows and which they are."""
    h = torch.randn(64, 5, requires_grad=True)
    labels = torch.full((64,), -100)
    labels[:10] = 3
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(h, torch.randn(1000, 5), None, labels, 10)
    assert sorted(tuple(t.shape) for t in kept) == [(10,), (10, 5)]


def test_without_gradients_and_without_labels() -> None:
    model = llama()
    expected = model(**batch()).loss
    deltaw.fuse_loss(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch()).loss, expected)
        assert model(**batch(masked=1.0)).loss.isnan()
    model.eval()
    assert torch.allclose(model(**batch()).loss, expected)


def test_logits_can_still_be_read() -> None:
    model = llama().eval()
    expected = model(**batch()).logits
    deltaw.fuse_loss(model)
    output = model(**batch())
    logits = output.logits
    assert isinstance(logits, Logits) and isinstance(logits, Tensor)
    assert (logits.shape, logits.dtype, logits.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    wide = logits.float()
    assert isinstance(wide, Logits) and wide.dtype == torch.float32
    assert torch.equal(logits[:, -1], expected[:, -1])
    assert torch.equal(torch.softmax(logits, -1), torch.softmax(expected, -1))
    assert torch.equal(wide + 0, expected.float())
    assert "Parameter" not in repr(logits) and f"{logits.sum():.3f}" == f"{expected.sum():.3f}"
    assert logits.requires_grad
    held = [p for p in model.parameters() if p.requires_grad]
    a = torch.autograd.grad(logits.square().sum(), held)
    b = torch.autograd.grad(expected.square().sum(), held)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_generation_is_what_it_was() -> None:
    model = llama().eval()
    ids = batch()["input_ids"]
    before = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    deltaw.fuse_loss(model)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), before
    )


def test_heads_that_do_more_keep_their_own_loss() -> None:
    """Gemma 2 caps its logits and Mixtral adds a loss of its routers."""
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
        MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True)),
    ):
        deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        shake(model, 0.2)
        loss, gradients = result(model, **batch())
        deltaw.fuse_loss(model)
        fused, found = result(model, **batch())
        assert abs(fused - loss) <= 1e-5 * loss
        assert_close(found, gradients, 1e-4)


def test_a_trained_head_gets_its_gradient() -> None:
    model = llama()
    deltaw.fuse_loss(model)
    model.lm_head.weight.requires_grad_(True)
    expected = result(llama(), **batch())[0]
    loss = model(**batch()).loss
    loss.backward()
    assert torch.allclose(loss, expected) and model.lm_head.weight.grad.any()


def test_a_head_that_is_adapted_later() -> None:
    model = llama()
    deltaw.detach(model)
    deltaw.fuse_loss(model)
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["lm_head"]))
    shake(model, 0.2)
    gradients = result(model, **batch())[1]
    assert all(g.any() for g in gradients)
    deltaw.detach(model)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_too(copied) -> None:
    model = llama()
    deltaw.fuse_loss(model)
    other = copied(model)
    assert torch.equal(result(other, **batch())[0], result(model, **batch())[0])
    assert isinstance(other(**batch()).logits, Logits)


def test_compiled_models_take_the_plain_loss() -> None:
    model = llama()
    expected = model(**batch()).loss
    deltaw.fuse_loss(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**batch()).loss, expected)


def test_it_can_be_undone() -> None:
    model = llama()
    loss = model.loss_function
    fused = deltaw.fuse_loss(model)
    assert type(model.lm_head).__mro__[1].__name__ == "WaitingHead"
    fused.remove()
    fused.remove()
    assert type(model.lm_head) is nn.Linear and model.loss_function is loss
    assert not isinstance(model(**batch()).logits, Logits)


def test_what_cannot_be_fused() -> None:
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=37,
            hidden_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=28,
        )
    )
    for model in (bert, nn.Linear(2, 2)):
        with pytest.raises(TargetError, match="causal language model itself"):
            deltaw.fuse_loss(model)
    model = llama()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["lm_head"]), "head")
    with pytest.raises(TargetError, match="output head is adapted"):
        deltaw.fuse_loss(model)
    model = llama()
    deltaw.fuse_loss(model)
    with pytest.raises(TargetError, match="fused already"):
        deltaw.fuse_loss(model)


def test_logits_that_are_read_first_without_gradients_have_them_still() -> None:
    """As those of the plain head, whoever reads them first, and in the dtype of the forward."""
    found = []
    for fused in (False, True):
        model = llama()
        if fused:
            deltaw.fuse_loss(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch())
        with torch.no_grad():
            seen = output.logits.argmax(-1)
        assert output.logits.argmax(-1).equal(seen)
        total = output.loss + output.logits.float().logsumexp(-1).mean()
        held = [p for p in model.parameters() if p.requires_grad]
        found.append([total.detach(), *torch.autograd.grad(total, held)])
    assert_close(found[1], found[0], 3e-2)


def test_a_head_with_a_forward_of_its_own() -> None:
    model = llama()
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(TargetError, match="before whatever replaced it"):
        deltaw.fuse_loss(model)


def test_what_reads_past_the_logits_is_told_what_to_do() -> None:
    model = llama()
    deltaw.fuse_loss(model)
    logits = model(**batch()).logits
    with pytest.raises(StateError, match=r"aten\.mul.*\nFix: give it logits\.clone\(\)"):
        torch.vmap(lambda row: row * 2)(logits)
    assert torch.equal(torch.vmap(lambda row: row * 2)(logits.clone()), logits * 2)
