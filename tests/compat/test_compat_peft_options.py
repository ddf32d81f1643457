"""The options that scripts give PEFT: those that change nothing are taken, others are refused."""

import dataclasses
import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_scripts import IDS, SETTINGS, bert, mlp, saved_by_peft, trainable

import deltaw
from deltaw.compat import peft as ours
from deltaw.errors import ConfigError, FormatError

theirs = pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_by_peft(tmp_path / "theirs")


def test_a_config_takes_every_option_of_peft_at_its_default() -> None:
    defaults = {
        name: option.default if option.default_factory is dataclasses.MISSING else {}
        for name, option in theirs.LoraConfig.__dataclass_fields__.items()
        if option.init
    }
    assert len(defaults) > 40 and defaults["layer_replication"] is None
    assert ours.LoraConfig(**{**defaults, "peft_type": "LORA"}) == ours.LoraConfig(
        runtime_config={}
    )


@pytest.mark.parametrize(
    ("option", "value", "feature"),
    [
        ("layer_replication", [(0, 2)], "layer replication"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
        ("use_qalora", True, "QA-LoRA"),
        ("peft_type", "IA3", "only 'LORA'"),
    ],
)
def test_a_config_names_the_feature_that_is_not_there(
    option: str, value: object, feature: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option}=.*{feature}"):
        ours.LoraConfig(**{option: value})


def test_the_calls_take_every_name_that_peft_gives() -> None:
    for ours_, theirs_ in (
        (ours.get_peft_model, theirs.get_peft_model),
        (ours.PeftModel.from_pretrained, theirs.PeftModel.from_pretrained),
        (ours.PeftModel.load_adapter, theirs.PeftModel.load_adapter),
        (ours.PeftModel.add_adapter, theirs.PeftModel.add_adapter),
        (ours.PeftModel.save_pretrained, theirs.PeftModel.save_pretrained),
    ):
        names = [name for name in inspect.signature(theirs_).parameters if name != "kwargs"]
        assert list(inspect.signature(ours_).parameters)[: len(names)] == names


def test_an_adapter_loads_with_the_options_of_a_base(folder: Path) -> None:
    config = ours.PeftConfig.from_pretrained(folder)
    model = ours.PeftModel.from_pretrained(
        bert(), folder, config=config, device_map="auto", torch_dtype=torch.float16, max_memory={}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.PeftModel.from_pretrained(bert(), str(folder))
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-5, atol=1e-5)


def test_options_that_would_change_what_is_loaded_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"key_mapping=\{'a': 'b'\}"):
        ours.PeftModel.from_pretrained(bert(), folder, key_mapping={"a": "b"})
    with pytest.raises(ConfigError, match=r"lora_alpha is 99, and 5 there(?s:.*)leave config out"):
        ours.PeftModel.from_pretrained(
            bert(), folder, config=ours.LoraConfig(**{**SETTINGS, "lora_alpha": 99})
        )
    with pytest.raises(ConfigError, match="mixed=True"):
        ours.get_peft_model(bert(), ours.LoraConfig(), mixed=True)


def test_a_model_is_saved_as_accelerate_has_it_saved(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = ours.get_peft_model(bert(), ours.LoraConfig(**SETTINGS))
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "a",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        safe_serialization=True,
        state_dict=accelerator.get_state_dict(model),
    )
    model.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    assert not (tmp_path / "c").exists()


def test_settings_are_read_without_the_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    config = ours.LoraConfig.from_pretrained(folder)
    assert isinstance(config, ours.LoraConfig) and config.inference_mode
    assert (config.task_type, config.r, config.lora_alpha) == ("SEQ_CLS", 2, 5)
    assert set(config.target_modules or ()) == {"key", "value"}
    assert config.peft_type == "LORA"
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        ours.LoraConfig.from_pretrained(folder.parent)


def test_settings_that_were_read_make_a_new_adapter(folder: Path) -> None:
    a = ours.get_peft_model(bert(), ours.LoraConfig.from_pretrained(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = theirs.get_peft_model(bert(), theirs.LoraConfig.from_pretrained(str(folder)))
    assert trainable(a) is trainable(b) is False
    config = dataclasses.replace(ours.LoraConfig.from_pretrained(folder), inference_mode=False)
    a = ours.get_peft_model(bert(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = theirs.get_peft_model(bert(), theirs.LoraConfig(**SETTINGS))
    assert a.get_nb_trainable_parameters() == b.get_nb_trainable_parameters()


def test_settings_of_a_loaded_adapter_make_a_second_one(folder: Path) -> None:
    model = ours.PeftModel.from_pretrained(bert(), folder)
    assert isinstance(model.peft_config["default"], ours.LoraConfig)
    model.add_adapter("b", model.peft_config["default"])
    parts = {name.split(".adapter.")[0] for name, _ in model.named_parameters() if ".b." in name}
    assert parts == {
        name.split(".adapter.")[0] for name, _ in model.named_parameters() if ".default." in name
    }
    assert model.peft_config["b"].lora_alpha == 5


def test_settings_are_written_as_peft_reads_them(tmp_path: Path) -> None:
    config = ours.LoraConfig(
        **SETTINGS, rank_pattern={"key": 3}, base_model_name_or_path=str(tmp_path)
    )
    config.save_pretrained(tmp_path / "config")
    content = json.loads((tmp_path / "config" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] is None
    a = theirs.LoraConfig.from_pretrained(str(tmp_path / "config"))
    b = ours.LoraConfig.from_pretrained(tmp_path / "config")
    assert (a.r, a.lora_alpha, set(a.target_modules)) == (2, 5, {"key", "value"})
    assert a.rank_pattern == b.rank_pattern == {"key": 3}
    assert dataclasses.replace(b, modules_to_save=None) == dataclasses.replace(
        config, base_model_name_or_path=None
    )
    known = theirs.LoraConfig().to_dict()
    assert config.to_dict().keys() <= known.keys()
    for name, value in ours.LoraConfig().to_dict().items():
        assert name == "peft_version" or value == known[name], name


def test_the_state_dict_of_the_adapter_is_that_of_peft(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs.PeftModel.from_pretrained(bert(), str(folder))
    expected = theirs.get_peft_model_state_dict(model)
    state = ours.get_peft_model_state_dict(
        ours.PeftModel.from_pretrained(bert(), folder, "x"), adapter_name="x"
    )
    assert state.keys() == expected.keys() and len(state) > 8
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def test_loading_under_a_name_that_is_taken_replaces_that_adapter(folder: Path) -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(**SETTINGS)).eval()
    fresh = model(IDS).logits.detach()
    model.load_adapter(folder, "default", is_trainable=True)
    saved = ours.PeftModel.from_pretrained(bert(), folder)
    assert torch.equal(model(IDS).logits, saved(IDS).logits)
    assert not torch.allclose(fresh, saved(IDS).logits, atol=1e-3)
    assert trainable(model) and model.active_adapter == "default"


def test_settings_of_an_adapter_of_deltaw_are_those_of_peft() -> None:
    model = mlp()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"], modules_to_save=[]), "a")
    config = ours.LoraConfig(r=3, target_modules=["0"])
    model = ours.get_peft_model(model, config, "b")
    assert [type(c) for c in model.peft_config.values()] == [ours.LoraConfig] * 2
    assert [c.lora_alpha for c in model.peft_config.values()] == [4, 8]


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "null"])
def test_an_adapter_of_a_name_that_no_folder_can_have_is_not_there(name: str) -> None:
    with pytest.raises(FormatError, match=r"There is no folder (owner/adapter/)?a"):
        ours.PeftModel.from_pretrained(bert(), name)
    with pytest.raises(FormatError, match=r"There is no folder (owner/adapter/)?a"):
        ours.PeftModel.from_pretrained(bert(), "owner/adapter", subfolder=name)


def test_an_eva_start_waits_for_its_data() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (4, 9), generator=generator)
    settings = {"r": 2, "target_modules": ["query", "output.dense"], "init_lora_weights": "eva"}
    model = ours.get_peft_model(bert(), ours.LoraConfig(**settings))
    before = bert()(ids).logits
    assert model.peft_config["default"].init_lora_weights == "eva"
    with pytest.raises(ConfigError, match="rows of inputs"):
        ours.initialize_lora_eva_weights(model, [{"input_ids": ids[:1, :2]}])
    with pytest.raises(ConfigError, match="dataloader"):
        ours.initialize_lora_eva_weights(model)
    ours.initialize_lora_eva_weights(model, [{"input_ids": ids}])
    assert isinstance(model, ours.PeftModel) and model.active_adapter == "default"
    assert list(model.peft_config) == ["default"]
    state = deltaw.capture(model)
    ranks = {p: len(layer.tensors["weight.lora_A"]) for p, layer in state.layers.items()}
    assert sum(ranks.values()) == 12 and len(ranks) == 6
    A = state.layers["bert.encoder.layer.1.output.dense"].tensors["weight.lora_A"]
    assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    assert torch.equal(model.eval()(ids).logits, before)
    other = ours.get_peft_model(bert(), ours.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigError, match="waits for it"):
        ours.initialize_lora_eva_weights(other, [{"input_ids": ids}])
