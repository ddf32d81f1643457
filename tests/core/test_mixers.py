"""Layers of mixers of state spaces, whose weights are read past their forward."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import deltaw
from deltaw.bypassing import READ
from deltaw.errors import TargetError
from deltaw.quant import storage_of


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=32)
    return MambaForCausalLM(config).eval()


def test_what_a_mixer_reads_by_itself_is_left_out_with_a_warning() -> None:
    model = mamba()
    plan = deltaw.attach(model, deltaw.LoraConfig(r=2))
    assert plan is not None and len(plan.targets) == 2
    assert {target.path.rpartition(".")[2] for target in plan.targets} == {"in_proj"}
    assert any("MambaMixer reads" in text and "dt_proj (2)" in text for text in plan.warnings)
    deltaw.verify(model, {"input_ids": torch.tensor([[1, 5, 3, 2]])})


@pytest.mark.parametrize("name", ["dt_proj", "x_proj", "out_proj", "conv1d"])
def test_naming_what_a_mixer_reads_by_itself_is_refused(name: str) -> None:
    config = deltaw.LoraConfig(r=2, target_modules=["in_proj", name])
    with pytest.raises(TargetError, match=rf"layers\.1\.mixer\.{name}: MambaMixer reads"):
        deltaw.plan(mamba(), config)


def test_only_the_mixers_of_a_hybrid_are_meant() -> None:
    config = BambaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        attn_layer_indices=[1],
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=20,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=4,
        vocab_size=32,
    )
    plan = deltaw.plan(BambaForCausalLM(config), deltaw.LoraConfig(r=2))
    names = {target.path.removeprefix("model.layers.") for target in plan.targets}
    assert "0.mamba.in_proj" in names and "1.self_attn.o_proj" in names
    assert "0.mamba.out_proj" not in names


NAMED = {
    "BloomAttention": {"dense"},
    "BloomMLP": {"dense_4h_to_h"},
    "DisentangledSelfAttention": {"in_proj"},
    "Gemma4AssistantForCausalLM": {"lm_head"},
    "Gemma4UnifiedAssistantForCausalLM": {"lm_head"},
    "MobileBertLMPredictionHead": {"dense", "decoder"},
}
"""Read in passes that transformers itself never makes (Bloom's slices, DeBERTa's queries apart),
or heads, which are targets by name alone and of which `verify` says what they miss."""
LAYER = re.compile(r"self\.(\w+) = nn\.(?:Linear|Conv1d|Conv2d|Conv3d)\(")
DTYPE = re.compile(r"self\.\w+\.weight(?:\.(?:dtype|device|shape|size|data)\b|, torch\.Tensor)")


@pytest.mark.slow
def test_every_weight_that_transformers_reads_past_a_forward_is_known() -> None:
    """In the sources: a layer made in `__init__` whose weight another method takes as a value."""
    found: dict[str, set[str]] = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for kind in ast.parse(file.read_text("utf-8")).body:
            if isinstance(kind, ast.ClassDef):
                found.setdefault(kind.name, set()).update(read_in(kind))
    missing = {
        name: names - set(READ.get(name, "").split()) - NAMED.get(name, set())
        for name, names in found.items()
    }
    assert {name: names for name, names in missing.items() if names} == {}
    for name, names in READ.items():
        assert name not in found or set(names.split()) <= found[name], name


def read_in(kind: ast.ClassDef) -> set[str]:
    made = set(LAYER.findall(ast.unparse(kind)))
    methods = [
        DTYPE.sub("", ast.unparse(each))
        for each in kind.body
        if isinstance(each, ast.FunctionDef) and "init" not in each.name
    ]
    return {name for name in made if any(f"self.{name}.weight" in text for text in methods)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_mixer_reads_by_itself_is_not_packed(kind: str) -> None:
    model = mamba()
    deltaw.quantize(model, kind)
    packed = {path for path, layer in model.named_modules() if storage_of(layer) is not None}
    assert {path.rpartition(".")[2] for path in packed} == {"in_proj"}
    assert torch.isfinite(model(torch.tensor([[1, 5, 3, 2]])).logits).all()


def test_a_convolution_of_linear_attention_is_refused() -> None:
    config = Lfm2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(TargetError, match=r"layers\.0\.conv\.conv: Lfm2ShortConv reads its weight"):
        deltaw.plan(Lfm2ForCausalLM(config), deltaw.LoraConfig(target_modules=["conv.conv"]))
