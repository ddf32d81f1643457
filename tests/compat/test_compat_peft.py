"""Scripts written for PEFT run with their import changed, and give what PEFT gives."""

import copy
import inspect
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft_scripts import CLASSIFIER, PLAIN, SEQ2SEQ, TWO_ADAPTERS, bert, fill, gpt2, mlp, run, t5

import deltaw
from deltaw.compat import peft as ours
from deltaw.compat.peft_targets import BY_MODEL_TYPE
from deltaw.errors import ConfigError, FormatError, TargetError

theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def both(script: str, tmp_path: Path) -> tuple[dict[str, object], dict[str, object]]:
    return (
        run(script, "peft", tmp_path / "theirs"),
        run(script, "deltaw.compat.peft", tmp_path / "ours"),
    )


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_classifier_is_tuned_saved_loaded_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = both(CLASSIFIER, tmp_path)
    for name in ("trained", "reloaded", "disabled", "merged"):
        close(a[name], b[name])
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)
    close(b["trained"], b["reloaded"])
    close(b["trained"], b["merged"])
    assert not torch.allclose(b["trained"], b["disabled"], atol=1e-3)
    theirs_line, ours_line = capsys.readouterr().out.splitlines()
    assert theirs_line == ours_line
    assert ours_line.startswith("trainable params: ") and "|| all params: " in ours_line


def test_two_adapters_are_switched_and_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = both(TWO_ADAPTERS, tmp_path)
    for x, y in zip(a["seen"], b["seen"], strict=True):
        close(x, y)
    assert torch.equal(a["words"], b["words"])
    assert a["active"] == b["active"] == ["first", "second"]
    assert a["names"] == b["names"] == ["a", "b", "b"]
    first, unchanged, second, a_, b_, _, base = b["seen"]
    assert torch.equal(first, unchanged) and torch.equal(first, a_) and torch.equal(second, b_)
    close(gpt2().eval()(input_ids=b["ids"]).logits, base)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


@pytest.mark.parametrize("script", [PLAIN, SEQ2SEQ], ids=["plain", "seq2seq"])
def test_other_scripts(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = both(script, tmp_path)
    for x, y in zip(a["seen"], b["seen"], strict=True):
        close(x, y)
    if "words" in a:
        assert torch.equal(a["words"], b["words"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


@pytest.mark.parametrize("script", [CLASSIFIER, TWO_ADAPTERS, SEQ2SEQ, PLAIN])
def test_the_files_pass_between_the_two_libraries(script: str, tmp_path: Path) -> None:
    _, b = both(script, tmp_path)
    sub = "first" if script is TWO_ADAPTERS else ""
    make = {CLASSIFIER: bert, TWO_ADAPTERS: gpt2, SEQ2SEQ: t5, PLAIN: mlp}[script]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        c = theirs.PeftModel.from_pretrained(make(), str(tmp_path / "ours" / sub))
    assert not [w for w in seen if "missing" in str(w.message).lower()]
    d = ours.PeftModel.from_pretrained(make(), tmp_path / "theirs" / sub)
    if script is PLAIN:
        outputs = [m(b["x"]) for m in (c, d)]
    else:
        inputs = {"input_ids": b["ids"]}
        if script is SEQ2SEQ:
            inputs["decoder_input_ids"] = b["ids"][:, :3]
        outputs = [m(**inputs).logits for m in (c, d)]
    close(*outputs)
    close(outputs[0], b["trained"] if script is CLASSIFIER else b["seen"][0])


def test_the_model_is_the_same_object_and_keeps_its_names() -> None:
    model = bert()
    keys = set(model.state_dict())
    peft_model = ours.get_peft_model(model, ours.LoraConfig(task_type="SEQ_CLS"))
    assert peft_model is model and model.get_base_model() is model
    assert isinstance(model, ours.PeftModel)
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert keys < set(model.state_dict())
    plain = inspect.signature(transformers.BertForSequenceClassification.forward)
    assert inspect.signature(type(model).forward) == plain
    assert model.unload() is model and type(model) is transformers.BertForSequenceClassification
    assert set(model.state_dict()) == keys


def test_defaults_are_those_of_peft() -> None:
    a, b = theirs.LoraConfig(), ours.LoraConfig()
    for name in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_rslora",
        "modules_to_save",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_bias",
        "inference_mode",
        "use_dora",
        "task_type",
        "init_lora_weights",
    ):
        assert getattr(a, name) == getattr(b, name), name
    assert [task.value for task in ours.TaskType] == [task.value for task in theirs.TaskType]


def test_targets_by_model_type_are_those_of_peft() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table

    assert len(BY_MODEL_TYPE) > 30
    for kind, names in BY_MODEL_TYPE.items():
        assert set(table[kind]) == set(names), kind


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"use_qalora": True}, "use_qalora=True: QA-LoRA is not supported"),
        ({"task_type": "NONSENSE"}, "task_type must be one of SEQ_CLS"),
        ({"r": 0}, "r must be a whole number above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        ours.LoraConfig(**settings)


def test_a_model_of_unknown_type_needs_targets() -> None:
    with pytest.raises(ConfigError, match="It is not known which layers to adapt in Sequential"):
        ours.get_peft_model(mlp(), ours.LoraConfig())


def test_what_matches_nothing_is_warned_of() -> None:
    config = ours.LoraConfig(target_modules=["query", "kwery"])
    with pytest.warns(UserWarning, match="target_modules 'kwery'.*matches nothing"):
        ours.get_peft_model(bert(), config)
    with pytest.raises(TargetError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.get_peft_model(bert(), ours.LoraConfig(target_modules=["kwery"]))


def test_heads_are_found_by_peft_within_words_too() -> None:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=40, dim=12, hidden_dim=20, n_layers=1, n_heads=2, max_position_embeddings=16
    )
    model = transformers.DistilBertForSequenceClassification(config)
    settings = {"task_type": "SEQ_CLS", "target_modules": ["q_lin"], "r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = theirs.get_peft_model(copy.deepcopy(model), theirs.LoraConfig(**settings))
    b = ours.get_peft_model(model, ours.LoraConfig(**settings))
    assert a.get_nb_trainable_parameters() == b.get_nb_trainable_parameters()


def test_only_the_active_adapter_is_trainable() -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(r=2), "a")
    model.add_adapter("b", ours.LoraConfig(r=3))

    def trainable() -> set[str]:
        return {
            name.split(".adapter.")[1].split(".")[0]
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    assert trainable() == {"a"} and model.active_adapter == "a"
    model.set_adapter("b")
    assert trainable() == {"b"} and model.active_adapters == ["b"]
    model.set_adapter("b", inference_mode=True)
    assert trainable() == set()
    model.set_adapter(["a", "b"])
    assert trainable() == {"a", "b"} and model.active_adapter == ["a", "b"]
    with pytest.warns(UserWarning, match="b was active; now a is"):
        model.set_adapter("b")
        model.delete_adapter("b")
    assert trainable() == {"a"} and model.active_adapter == "a"


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_is_frozen_unless_asked(trainable: bool, tmp_path: Path) -> None:
    ours.get_peft_model(bert(), ours.LoraConfig(r=2)).save_pretrained(tmp_path)
    model = ours.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=trainable)
    assert model.training is trainable
    assert any(p.requires_grad for p in model.parameters()) is trainable


def test_selected_adapters_are_saved(tmp_path: Path) -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(r=2))
    model.add_adapter("b", ours.LoraConfig(r=3))
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["b"]
    model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / "adapter_config.json").is_file()
    assert (tmp_path / "all" / "b" / "adapter_config.json").is_file()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    again = ours.PeftModel.from_pretrained(bert(), tmp_path / "all", subfolder="b")
    assert again.peft_config["default"].r == 3


def test_merging_is_undone_bit_for_bit() -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(r=2, lora_alpha=5))
    fill(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter(["default"])
    assert not torch.equal(
        model.state_dict()["bert.encoder.layer.0.attention.self.query.weight"],
        before["bert.encoder.layer.0.attention.self.query.weight"],
    )
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_copies_and_pickles_are_peft_models() -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(r=2)).eval()
    fill(model)
    ids = torch.arange(6).view(1, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, ours.PeftModel)
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_an_adapter_in_the_hub_cache_is_found(tmp_path: Path) -> None:
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--someone--adapter"
    snapshot = cache / "snapshots" / "0" / "sub"
    ours.get_peft_model(bert(), ours.LoraConfig(r=3)).save_pretrained(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0")
    model = ours.PeftModel.from_pretrained(bert(), "someone/adapter", subfolder="sub")
    assert model.peft_config["default"].r == 3
    with pytest.raises(FormatError, match="someone/missing"):
        ours.PeftModel.from_pretrained(bert(), "someone/missing")
    with pytest.raises(FormatError, match=r"has no adapter_config\.json"):
        ours.PeftModel.from_pretrained(bert(), tmp_path)


def test_the_trainer_of_transformers_trains_and_saves_it(tmp_path: Path) -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(task_type="SEQ_CLS", r=2))
    rows = [{"input_ids": torch.arange(5) + i, "labels": i % 3} for i in range(6)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".adapter." in name for name in moved)
    saved = ours.PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-2")
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(saved(ids).logits, model.eval()(ids).logits)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_deltaw_sees_the_same_model() -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(r=2))
    deltaw.attach(model, deltaw.LoraConfig(r=3, modules_to_save=[]), "other")
    assert list(deltaw.configs(model)) == ["default", "other"]
