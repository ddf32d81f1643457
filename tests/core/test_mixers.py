"""Layers of mixers of state spaces, whose weights are read past their forward."""

import importlib
import inspect

import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models import auto

import deltaw
from deltaw.bypassing import READ
from deltaw.errors import TargetError


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


def test_transformers_reads_these_weights() -> None:
    """Every entry is one of a class that is there and reads it."""
    sources = {}
    for name in ("mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "zamba2", "bamba"):
        sources |= found(name)
    for name in ("falcon_h1", "granitemoehybrid", "nemotron_h"):
        sources |= found(name)
    assert sources.keys() == READ.keys()
    for kind, names in READ.items():
        assert all(f"self.{name}.weight" in sources[kind] for name in names), kind


def found(model_type: str) -> dict[str, str]:
    assert model_type in auto.configuration_auto.CONFIG_MAPPING_NAMES
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    own = {name: kind for name, kind in vars(module).items() if name in READ}
    return {name: inspect.getsource(kind) for name, kind in own.items()}
