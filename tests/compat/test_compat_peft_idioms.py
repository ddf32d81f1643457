"""What scripts do with PEFT's settings, classes and state dicts, they can do with ours."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft_scripts import IDS, SETTINGS, bert, mlp, saved_by_peft, trainable

from deltaw.compat import peft as ours
from deltaw.errors import ConfigError, FormatError

theirs = pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_by_peft(tmp_path / "theirs")


def test_settings_are_assigned_as_scripts_do_and_checked_where_they_are_used(
    tmp_path: Path,
) -> None:
    config = ours.LoraConfig(**SETTINGS)
    config.inference_mode, config.r, config.target_modules = True, 3, {"query"}
    model = ours.get_peft_model(bert(), copy.deepcopy(config))
    assert not trainable(model) and model.peft_config["default"].r == 3
    adapted = {n.split(".adapter.")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted and all(path.endswith(".query") for path in adapted)
    assert config.to_dict()["target_modules"] == ["query"]
    config.r, config.use_qalora = 0, True
    for use in (
        lambda: ours.get_peft_model(bert(), config),
        lambda: model.add_adapter("b", config),
        lambda: config.save_pretrained(tmp_path),
    ):
        with pytest.raises(ConfigError, match="use_qalora=True: QA-LoRA is not supported"):
            use()
    with pytest.raises(AttributeError, match="no setting 'rank'"):
        config.rank = 4
    assert not list(tmp_path.iterdir())


def test_what_is_assigned_to_a_models_settings_is_saved(folder: Path, tmp_path: Path) -> None:
    model = ours.PeftModel.from_pretrained(bert(), folder)
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "a")
    config = ours.PeftConfig.from_pretrained(tmp_path / "a")
    assert config.base_model_name_or_path == "owner/base"
    model.peft_config["default"].lora_dropout = 7
    with pytest.raises(ConfigError, match="lora_dropout must lie in"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_dictionary_of_settings_makes_a_config() -> None:
    values = {"peft_type": "LORA", **SETTINGS}
    assert ours.get_peft_config(values) == ours.LoraConfig(**SETTINGS)
    assert theirs.get_peft_config(values).r == ours.get_peft_config(values).r


def test_the_class_of_a_model_tells_its_task(folder: Path) -> None:
    names = {
        "SEQ_CLS": "PeftModelForSequenceClassification",
        "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
        "CAUSAL_LM": "PeftModelForCausalLM",
        "TOKEN_CLS": "PeftModelForTokenClassification",
        "QUESTION_ANS": "PeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
    }
    assert all(hasattr(theirs, name) for name in names.values())
    assert list(names) == [task.value for task in theirs.TaskType]
    for task in names:
        model = ours.get_peft_model(bert(), ours.LoraConfig(**{**SETTINGS, "task_type": task}))
        for other in names:
            assert isinstance(model, getattr(ours, names[other])) == (task == other)
    for kind in (ours.PeftModel, ours.PeftModelForSequenceClassification):
        model = kind.from_pretrained(bert(), folder)
        assert isinstance(model, ours.PeftModelForSequenceClassification)
    assert type(model.unload()) is type(bert())


def test_a_state_dict_is_set_as_it_was_got(folder: Path) -> None:
    saved = ours.PeftModel.from_pretrained(bert(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.PeftModel.from_pretrained(bert(), str(folder))
    for state in (
        ours.get_peft_model_state_dict(saved),
        theirs.get_peft_model_state_dict(other),
    ):
        model = ours.get_peft_model(bert(), ours.LoraConfig(**SETTINGS)).eval()
        ours.set_peft_model_state_dict(model, state)
        assert torch.equal(model(IDS).logits, saved(IDS).logits)
        assert trainable(model)
    parts = {name: tensor for name, tensor in state.items() if "classifier" not in name}
    with pytest.raises(
        FormatError, match=r"classifier\.bias' is missing(?s:.*)classifier\.weight'"
    ):
        ours.set_peft_model_state_dict(model, parts)
    name = next(name for name in state if "lora_A" in name)
    with pytest.raises(FormatError, match=r"'odd' is unexpected(?s:.*)is \(2, 5\), not \(2, 12\)"):
        odd = {**state, name: state[name][:, :5], "odd": torch.ones(1)}
        ours.set_peft_model_state_dict(model, odd)
    assert torch.equal(model(IDS).logits, saved(IDS).logits)


def test_a_warning_points_at_the_script() -> None:
    with pytest.warns(UserWarning, match="nothing") as seen:
        ours.get_peft_model(mlp(), ours.LoraConfig(r=2, target_modules=["0", "nothing"]))
    assert {warning.filename for warning in seen} == {__file__}
