"""What is read of the folders that PEFT and others wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_states import layer, same_layers
from peft_folders import CONFIG, P, folder_of, pair

from deltaw.config import LoraConfig
from deltaw.errors import FormatError
from deltaw.formats import peft
from deltaw.state import LayerState, State


def test_absent_settings_are_those_of_peft(tmp_path: Path) -> None:
    state = peft.read(folder_of(tmp_path, {"peft_type": "LORA"}, pair("h.q", 8)))
    assert (state.config.r, state.config.lora_alpha) == (8, 8)
    assert state.layers["h.q"].scale == 1.0
    assert state.config.target_modules == ["h.q"]
    assert state.config.modules_to_save == [] and state.base is None


def test_settings_of_every_version_are_accepted_at_neutral_values(tmp_path: Path) -> None:
    neutral: dict[str, object] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "auto_mapping": {"base_model_class": "X"},
        "corda_config": None,
        "enable_lora": None,
        "ensure_weight_tying": False,
        "eva_config": {"rho": 2.0},
        "exclude_modules": None,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": "",
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "merge_weights": False,
        "monteclora_config": None,
        "peft_version": "0.18.2",
        "qalora_group_size": 16,
        "rank_pattern": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    }
    assert peft.read(folder_of(tmp_path, CONFIG | neutral, pair("h.q"))).layers.keys() == {"h.q"}


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_the_start_is_never_repeated(start: object, tmp_path: Path) -> None:
    state = peft.read(folder_of(tmp_path, CONFIG | {"init_lora_weights": start}, pair("h.q")))
    assert state.config.init_lora_weights is True


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_that_changed_the_base_is_refused(start: str, tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG | {"init_lora_weights": start}, pair("h.q"))
    with pytest.raises(FormatError, match=f"'{start}': this start changed the base"):
        peft.read(tmp_path)


def test_settings_never_seen_before_are_named_in_a_warning(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG | {"use_magic": True, "a_new_one": None}, pair("h.q"))
    with pytest.warns(UserWarning, match="'a_new_one', 'use_magic'"):
        peft.read(tmp_path)


@pytest.mark.parametrize(
    "heads", [["lora_A"], ["up.lora_A"], ["up.lora_A", "up.lora_B"], ["up.lora_B.lora_A"]]
)
def test_heads_may_be_called_like_the_factors_of_an_adapter(
    heads: list[str], tmp_path: Path
) -> None:
    saved = {
        path: LayerState("module", {"weight.trained": torch.randn(3, 5), "bias.trained": ones})
        for path, ones in zip(heads, (torch.ones(3), torch.ones(3) * 2), strict=False)
    }
    state = State(LoraConfig(r=3, modules_to_save=heads), {"h.q": layer("linear"), **saved})
    peft.write(state, tmp_path / "listed")
    assert same_layers(peft.read(tmp_path / "listed"), state)
    inside = replace(state.config, modules_to_save=["up"])
    peft.write(replace(state, config=inside), tmp_path / "inside")
    if heads != ["up.lora_A", "up.lora_B"]:  # which look like an adapter on `up`
        assert same_layers(peft.read(tmp_path / "inside"), state)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()
    assert peft.read(folder_of(tmp_path, text, pair("h.q"))).layers.keys() == {"h.q"}


def test_a_legacy_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    tensors = pair("h.q")
    folder_of(tmp_path, CONFIG, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    a = peft.read(tmp_path)
    b = peft.read(folder_of(tmp_path / "b", CONFIG, tensors))
    assert same_layers(a, b)


def test_the_tensor_file_stands_for_its_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG, pair("h.q"))
    file = tmp_path / "adapter_model.safetensors"
    assert peft.sniff(file) and peft.sniff(tmp_path)
    assert same_layers(peft.read(file), peft.read(tmp_path))
    assert not peft.sniff(tmp_path / "adapter_config.json")


def test_patterns_of_alpha_take_the_first_that_matches(tmp_path: Path) -> None:
    patterns = {"^h.q": 12, "q": 9, "h.q": 15}
    tensors = pair("h.q") | pair("z.h.q") | pair("xq")
    state = peft.read(folder_of(tmp_path, CONFIG | {"alpha_pattern": patterns}, tensors))
    scales = {path: at.scale for path, at in state.layers.items()}
    assert scales == {"h.q": 4.0, "z.h.q": 3.0, "xq": 2.0}


def test_patterns_that_name_no_layer_or_would_run_for_years_do_not_matter(tmp_path: Path) -> None:
    config = CONFIG | {"target_modules": "(a+)+$", "rank_pattern": {"(a+)+$": 3, "gone": 3}}
    state = peft.read(folder_of(tmp_path, config, pair("h." + "a" * 40 + "!")))
    assert len(state.layers) == 1


def test_biases_inside_the_wrappers_of_peft_are_not_taken_for_the_models(tmp_path: Path) -> None:
    tensors = pair("h.q") | {
        P + "h.q.base_layer.bias": torch.ones(7),
        P + "head.bias": torch.ones(2),
        P + "head.weight": torch.ones(2, 7),
        P + "head.original_module.bias": torch.zeros(2),
        P + "head.modules_to_save.bias": torch.ones(2),
    }
    state = peft.read(folder_of(tmp_path, CONFIG | {"bias": "all"}, tensors))
    assert state.layers.keys() == {"h.q", "head"}
    assert state.layers["h.q"].tensors.keys() == {
        "weight.lora_A",
        "weight.lora_B",
        "bias.trained",
    }
    assert state.layers["head"].tensors.keys() == {"weight.trained", "bias.trained"}


def test_the_frozen_weight_beside_an_adapted_embedding_is_named_and_left(tmp_path: Path) -> None:
    tensors = {
        P + "wte.lora_embedding_A": torch.randn(3, 5),
        P + "wte.lora_embedding_B": torch.randn(7, 3),
        P + "wte.base_layer.weight": torch.randn(5, 7),
        P + "head.base_layer.weight": torch.randn(5, 7),
    }
    with pytest.warns(UserWarning, match=r"wte\.base_layer\.weight'.* not read") as seen:
        state = peft.read(folder_of(tmp_path, CONFIG, tensors))
    assert len(seen) == 1
    assert state.layers["wte"].tensors.keys() == {"weight.lora_A", "weight.lora_B"}
    assert state.layers["head.base_layer"].tensors.keys() == {"weight.trained"}


def test_real_adapters_of_other_peoples_runs_are_read(shared: Path) -> None:
    folder = shared / "adapters"
    roberta = peft.read(folder / "peft_roberta_base_mrpc_r8")
    assert len(roberta.layers) == 26 and roberta.config.task_type == "SEQ_CLS"
    assert {at.scale for at in roberta.layers.values() if at.kind == "linear"} == {2.0}
    assert roberta.layers["classifier.out_proj"].tensors["weight.trained"].shape == (2, 768)
    gpt2 = peft.read(folder / "trl_gpt2_kto_hh")
    assert {at.kind for at in gpt2.layers.values()} == {"conv1d"} and len(gpt2.layers) == 12
    opt = peft.read(folder / "peft_regression_opt350m")
    assert len(opt.layers) == 48 and opt.config.init_lora_weights is True
    with pytest.raises(FormatError, match="MLX's adapter format"):
        peft.read(folder / "mlx_qwen25_05b_dpo_2iters")


@pytest.mark.parametrize("name", ["peft_roberta_base_mrpc_r8", "trl_gpt2_kto_hh"])
def test_a_real_adapter_written_again_holds_the_same_tensors(
    name: str, shared: Path, tmp_path: Path
) -> None:
    source = shared / "adapters" / name
    state = peft.read(source)
    peft.write(state, tmp_path)
    assert same_layers(peft.read(tmp_path), state)
    written, original = (p / "adapter_model.safetensors" for p in (tmp_path, source))
    assert written.read_bytes() == original.read_bytes()
