"""Which layers are adapted and trained in full: the same as with PEFT."""

import copy
import warnings

import pytest
import torch
from peft_scripts import bert, trainable
from torch import nn

from deltaw.compat import peft as ours

theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def roberta() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, intermediate_size=20, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=20, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def both(model: nn.Module, **settings: object) -> tuple[nn.Module, nn.Module]:
    """Return the model adapted by PEFT and by deltaw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = theirs.get_peft_model(copy.deepcopy(model), theirs.LoraConfig(**settings))
    return a, ours.get_peft_model(copy.deepcopy(model), ours.LoraConfig(**settings))


def adapted(model: nn.Module, mark: str) -> set[str]:
    names = {name.removeprefix("base_model.model.") for name, _ in model.named_parameters()}
    return {name.split(mark)[0] for name in names if mark in name and "lora_A" in name}


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"task_type": "SEQ_CLS"},
        {"task_type": "FEATURE_EXTRACTION"},
        {"modules_to_save": ["embeddings.LayerNorm"]},
        {"modules_to_save": ["classifier"]},
        {"exclude_modules": ".*classifier.*"},
    ],
)
def test_all_linear_takes_the_head_unless_it_is_trained_in_full(
    make: object, settings: dict[str, object]
) -> None:
    a, b = both(make(), target_modules="all-linear", r=2, **settings)
    assert adapted(a, ".lora_A") == adapted(b, ".adapter.default")
    assert a.get_nb_trainable_parameters() == b.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("make", "named"), [(llama, ["norm"]), (llama, ["model.norm"]), (bert, ["LayerNorm", "oler"])]
)
def test_modules_to_save_match_within_words(make: object, named: list[str]) -> None:
    targets = ["q_proj", "query"] if make is bert else ["q_proj", "v_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = both(make(), r=2, target_modules=targets, modules_to_save=named)
    assert a.get_nb_trainable_parameters() == b.get_nb_trainable_parameters()
    assert trainable(b)


def test_a_module_to_save_that_is_not_there_is_warned_of() -> None:
    config = ours.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "nrom"])
    with pytest.warns(UserWarning, match="modules_to_save 'nrom' .* matches nothing") as seen:
        ours.get_peft_model(llama(), config)
    assert len(seen) == 1


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=20, num_key_value_heads=1, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("named", [None, [], ["o_proj"]])
def test_parameters_beside_the_layers_of_peft(named: list[str] | None) -> None:
    """Left out, there are none."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    a, b = both(mixtral(), target_modules=named, target_parameters=experts, r=2)
    layers = {path for path in adapted(a, ".lora_") if "experts" not in path}
    assert {path for path in adapted(b, ".adapter.") if "experts" not in path} == layers
    assert bool(layers) == bool(named)
    assert b.get_nb_trainable_parameters() == a.get_nb_trainable_parameters()


def test_rows_of_tokens_are_counted_as_peft_counts_them() -> None:
    a, b = both(llama(), target_modules=["q_proj"], trainable_token_indices=[3, 4])
    assert b.get_nb_trainable_parameters()[0] == a.get_nb_trainable_parameters()[0]
