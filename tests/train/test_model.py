"""Base models: which revision is loaded, and what its weights may lack."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
import transformers
from tests.train.models import events, make_model
from torch import nn

from deltaw.errors import RunError
from deltaw.train.methods import prepare
from deltaw.train.model import load_base, load_config, load_empty, load_model, positions
from deltaw.train.opened import open_run
from deltaw.train.recipe import parse
from deltaw.train.run import train

EMBEDDINGS = "embeddings.word_embeddings.weight"
SIZES = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TINY: dict[str, transformers.PretrainedConfig] = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=120, dim=16, n_layers=2, n_heads=2, hidden_dim=24
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=120, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    ),
    "llama": transformers.LlamaConfig(**SIZES),
    "deberta": transformers.DebertaV2Config(**SIZES),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with the model `someone/tiny` in its revisions `main` and `v1.0`."""
    model = tmp_path / "hub" / "models--someone--tiny"
    for number, revision in enumerate(("main", "v1.0")):
        commit = str(number) * 40
        folder = make_model(model / "snapshots" / commit)
        change_weights(folder, lambda name, t, by=number: {name: t + by / 100})
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / "snapshots"


def change_weights(folder: Path, change: Any) -> None:
    """Replace each tensor of a model's file by what `change(name, tensor)` returns."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    changed = {k: t for name, old in tensors.items() for k, t in change(name, old).items()}
    safetensors.torch.save_file(changed, file, metadata={"format": "pt"})


def start(model: Path | str, tiny: Path, output: Path, **more: Any) -> Path:
    values = {"model": str(model), "data": str(tiny / "data.csv"), "output": str(output)}
    return train(parse(values | {"max_steps": 2, "eval_every": 2} | more), silent=True)


def test_a_revision_means_the_weights_too_and_stands_in_the_adapter(
    hub: Path, tiny: Path, tmp_path: Path
) -> None:
    run = start("someone/tiny", tiny, tmp_path / "run", revision="v1.0")
    file = safetensors.torch.load_file(hub / ("1" * 40) / "model.safetensors")
    for model in (open_run(run).model, load_base("someone/tiny", revision="v1.0")):
        assert torch.equal(model.state_dict()[f"bert.{EMBEDDINGS}"], file[EMBEDDINGS])
    config = json.loads((run / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert config["revision"] == "v1.0"


@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_adapters_without_a_low_rank_name_the_revision(
    hub: Path, tiny: Path, tmp_path: Path, method: str
) -> None:
    run = start("someone/tiny", tiny, tmp_path / "run", revision="v1.0", method=method)
    config = json.loads((run / "adapter_config.json").read_text("utf-8"))
    assert config["revision"] == "v1.0"


def test_an_empty_model_is_of_its_revision(hub: Path) -> None:
    config = hub / ("1" * 40) / "config.json"
    config.write_text(config.read_text("utf-8").replace('"num_hidden_layers": 2', _LAYERS))
    layers = [
        load_empty("someone/tiny", revision=revision).config.num_hidden_layers
        for revision in (None, "v1.0")
    ]
    assert layers == [2, 5]


_LAYERS = '"num_hidden_layers": 5'


def test_weights_of_other_names_are_refused_with_all_that_is_missing(
    tiny: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    change_weights(model, lambda name, t: {f"zzz.{name}": t})
    with pytest.raises(RunError, match="Fix: ") as caught:
        start(model, tiny, tmp_path / "run")
    message = str(caught.value)
    assert "do not fit BertForSequenceClassification:" in message
    assert "bert.embeddings.LayerNorm.bias: missing" in message
    assert "(39 of other names, such as zzz.embeddings.LayerNorm.bias) do not fit" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_tensor_and_one_of_another_shape_are_listed_together(
    tiny: Path, tmp_path: Path
) -> None:
    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name == "pooler.dense.bias":
            return {}
        return {name: tensor[:-1].clone() if name == EMBEDDINGS else tensor}

    model = shutil.copytree(tiny / "model", tmp_path / "model")
    change_weights(model, change)
    with pytest.raises(RunError) as caught:
        start(model, tiny, tmp_path / "run")
    rows = safetensors.torch.load_file(tiny / "model" / "model.safetensors")[EMBEDDINGS].shape[0]
    assert str(caught.value).count("\n  - ") == 2
    assert "bert.pooler.dense.bias: missing" in str(caught.value)
    assert f"bert.{EMBEDDINGS}: ({rows - 1}, 16) in the weights, ({rows}, 16) in the model" in str(
        caught.value
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", TINY)
def test_a_base_gets_a_new_head(kind: str, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_config(TINY[kind])
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01)  # as if it had been trained, biases too
    base.save_pretrained(tmp_path)
    model, untrained = load_model(load_config(str(tmp_path), ["a", "b"]), str(tmp_path), 0)
    assert untrained == []
    prefix = str(model.base_model_prefix)
    loaded = model.get_submodule(prefix).state_dict()
    assert loaded
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in loaded.items())


def test_a_head_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, num_labels=5)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model, _ = load_model(load_config(str(tmp_path), ["a", "b"]), str(tmp_path), 0)
    assert model.classifier.out_features == 2


@pytest.fixture(params=["absent", "untouched"])
def unpooled(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """A model of masked words without a pooler, or one of sentences that never used its own."""

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.startswith("pooler."):
            return {name: tensor}
        zero = name.endswith("bias")
        return {} if request.param == "absent" else {name: tensor * 0 if zero else tensor}

    model = shutil.copytree(tiny / "model", tmp_path / "unpooled")
    change_weights(model, change)
    return model


def said(run: Path) -> str:
    return "\n".join(str(event.get("text", "")) for event in events(run))


@pytest.mark.parametrize("method", ["lora", "head", "bitfit"])
def test_a_pooler_that_nobody_trained_is_trained_in_full(
    unpooled: Path, tiny: Path, tmp_path: Path, method: str
) -> None:
    run = start(unpooled, tiny, tmp_path / "run", method=method)
    assert (
        "warning   bert.pooler was never trained (the weights lack it, or its bias is still zero): "
        "it is trained in full like the head" in said(run)
    )
    names = safetensors.torch.load_file(run / "adapter_model.safetensors")
    assert {name for name in names if "pooler" in name} == {
        "base_model.model.bert.pooler.dense.bias",
        "base_model.model.bert.pooler.dense.weight",
    }
    assert any("classifier" in name for name in names)
    open_run(run)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_pooler_left_out_of_modules_to_save_is_a_warning(
    unpooled: Path, tiny: Path, tmp_path: Path, method: str
) -> None:
    run = start(unpooled, tiny, tmp_path / "run", modules_to_save=["classifier"], method=method)
    assert "it is not trained in full now; add it to modules_to_save" in said(run)


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_methods_that_train_weights_train_such_a_pooler_too(
    unpooled: Path, tiny: Path, tmp_path: Path, method: str
) -> None:
    run = start(unpooled, tiny, tmp_path / "run", method=method)
    assert open_run(run).model.bert.pooler.dense.weight.requires_grad


def test_roberta_has_fewer_positions_than_rows(tiny: Path, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=24, pad_token_id=0)
    model = transformers.RobertaModel(config)
    assert positions(model) == 23
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "long.csv"
    rows = [f"{'order ' * 50}{n} refund,{'ab'[n % 2]}\n" for n in range(40)]
    data.write_text("text,label\n" + "".join(rows))
    run = start(tmp_path / "model", tiny, tmp_path / "run", data=str(data))
    assert open_run(run).recipe.max_length == 23


def test_models_without_learned_positions_have_no_limit() -> None:
    with torch.device("meta"):
        t5 = transformers.T5Model(
            transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_heads=2)
        )
        xlnet = transformers.XLNetModel(
            transformers.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8)
        )
        bert = transformers.BertModel(TINY["bert"])
    assert (positions(t5), positions(xlnet), positions(bert)) == (None, None, 512)


def llama() -> nn.Module:
    """A tiny model without biases, whose normalisations are of a class of its own."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def test_bitfit_on_a_model_without_biases_is_refused() -> None:
    model = llama()
    with pytest.raises(RunError, match=r"LlamaForSequenceClassification has none(.|\n)*Fix: use m"):
        prepare(model, parse({"model": "m", "data": "d", "method": "bitfit"}))


def test_tuning_of_normalisations_finds_those_that_models_bring_along() -> None:
    model = llama()
    chosen = parse({"model": "m", "data": "d", "method": "layernorm"})
    prepare(model, chosen)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("norm" in name for name in trained) == 3
    assert len(trained) == 4 and any("score" in name for name in trained)
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RunError, match=r"Sequential has none(.|\n)*Fix: use method=head"):
        prepare(plain, chosen)
