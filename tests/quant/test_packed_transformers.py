"""Models that transformers packs while it loads them are as those that `quantize` packs."""

from pathlib import Path

import pytest
import torch
from core.tiny import gpt2, llama
from quant.packed_models import dense, over
from torch import nn

import deltaw
from deltaw.quant import storage_of

transformers = pytest.importorskip("transformers")
KINDS = ("nf4", "fp4", "int8", "torchao-int8")


def settings(kind: str) -> object:
    """What transformers calls a kind."""
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def loaded(kind: str, folder: Path, make: object = llama) -> nn.Module:
    """A tiny model through a folder."""
    make().save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings(kind), dtype=torch.float32
    )
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(1, 32, (3, 7), generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapt(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    deltaw.attach(model, deltaw.LoraConfig(r=3, lora_alpha=5), generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@over(*KINDS)
def test_loaded_as_packed(kind: str, tmp_path: Path) -> None:
    """The same bits, outputs and gradients, merged too."""
    theirs = loaded(kind, tmp_path)
    deltaw.prepare_quantized(theirs)
    ours = llama()
    packed = deltaw.quantize(ours, kind)
    assert len(packed) == 14
    for path in packed:
        assert torch.equal(dense(theirs.get_submodule(path)), dense(ours.get_submodule(path)))
    with torch.no_grad():
        before = theirs(ids()).logits
    adapt(theirs), adapt(ours)
    assert torch.equal(theirs(ids()).logits, ours(ids()).logits)
    assert not torch.equal(theirs(ids()).logits, before)
    found, expected = gradients(theirs.train()), gradients(ours.train())
    assert len(found) == 28 and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    with torch.no_grad():
        plain = theirs.eval()(ids()).logits
        deltaw.merge(theirs, dtype=torch.float32)
        tolerance = 5e-2 if kind == "int8" else 1e-4
        assert torch.allclose(theirs(ids()).logits, plain, atol=tolerance, rtol=tolerance)
        deltaw.unmerge(theirs)
        assert torch.equal(theirs(ids()).logits, plain)
    deltaw.detach(theirs)
    with torch.no_grad():
        assert torch.equal(theirs(ids()).logits, before)


@over(*KINDS)
def test_a_final_merge_is_saved_as_a_plain_model(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path / "base")
    deltaw.prepare_quantized(model)
    adapt(model)
    with torch.no_grad():
        expected = model(ids()).logits
    deltaw.merge(model, original="none", dtype=torch.float32)
    deltaw.detach(model)
    model.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    tolerance = 5e-2 if kind == "int8" else 1e-4
    assert torch.allclose(plain(ids()).logits, expected, atol=tolerance, rtol=tolerance)


@over("nf4")
def test_gpt2s_layers_become_linear(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path, gpt2)
    deltaw.prepare_quantized(model)
    assert storage_of(model.transformer.h[0].mlp.c_fc) is not None
    adapt(model)
    assert len(gradients(model)) == 2 * 8


@over(*KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    """Of whole blocks, with the gradients of a plain pass; reentrant ones sum in another order."""
    model = llama()
    deltaw.quantize(model, kind)
    deltaw.prepare_quantized(model, checkpointing=True)
    adapt(model)
    model.train()
    model.activation_checkpointing_disable()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 28
    for name, gradient in found.items():
        difference = (gradient - expected[name]).abs().max()
        assert difference <= (1e-5 * expected[name].abs().max() if reentrant else 0), name


@over("nf4")
def test_the_name_of_peft(kind: str) -> None:
    from deltaw.compat.peft import prepare_model_for_kbit_training

    model = llama(torch.bfloat16)
    deltaw.quantize(model, kind)
    assert prepare_model_for_kbit_training(model) is model
    adapt(model)
    assert model.model.norm.weight.dtype == torch.float32 and model.is_activation_checkpointing
    assert len(gradients(model.train())) == 28


@over("nf4", "torchao-int8")
def test_verify_and_save(kind: str, tmp_path: Path) -> None:
    model = llama()
    deltaw.quantize(model, kind)
    adapt(model)
    deltaw.verify(model, {"input_ids": ids(), "labels": ids()})
    model.save_pretrained(tmp_path)
    other = llama()
    deltaw.quantize(other, kind)
    deltaw.load(other, tmp_path)
    assert torch.equal(other(ids()).logits, model(ids()).logits)
