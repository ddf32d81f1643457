"""`--to peft`: PEFT reads what was written, and answers as before."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from language_models import (
    logits,
    save_adapter,
    save_base,
    tokenizer,
    with_peft,
)
from safetensors.torch import load_file

from deltaw.errors import FormatError, RunError
from deltaw.export import export


def settings(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_gives_equal_logits(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind)
    names = ["c_attn", "c_fc", "mlp.c_proj"] if kind == "gpt2" else ["q_proj", "up_proj", "lm_head"]
    source = save_adapter(
        tmp_path / "run",
        base,
        target_modules=names,
        use_rslora=True,
        rank_pattern={"c_fc": 5} if kind == "gpt2" else {"up_proj": 5},
    )
    told = export(source, tmp_path / "out", to="peft", base=str(base))
    given, written = (logits(with_peft(base, folder)) for folder in (source, tmp_path / "out"))
    assert torch.equal(given, written)
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert (given - plain).abs().max() > 0.1
    assert "r=3 lora_alpha=7" in told["written"]


def test_a_start_that_is_subtracted_becomes_a_plain_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, init_lora_weights="pissa")
    export(source, tmp_path / "out", to="peft", base=str(base))
    assert settings(tmp_path / "out")["init_lora_weights"] is True
    assert settings(tmp_path / "out")["r"] == 6
    assert torch.equal(logits(with_peft(base, source)), logits(with_peft(base, tmp_path / "out")))


def test_the_tokenizer_and_its_chat_template_come_from_the_adapters_folder(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    export(source, tmp_path / "bases", to="peft", base=str(base))
    assert not (tmp_path / "bases" / "chat_template.jinja").exists()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer(template).save_pretrained(source)
    export(source, tmp_path / "own", to="peft", base=str(base))
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == template
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "own")("w4")["input_ids"] == [7]


def test_a_hub_name_and_its_revision_are_written_and_local_paths_are_not(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(
        tmp_path / "run", base, base_model_name_or_path="nobody/model", revision="abc"
    )
    for name, given in (("offline", None), ("local", str(base))):
        told = export(source, tmp_path / name, to="peft", base=given)
        assert settings(tmp_path / name)["base_model_name_or_path"] == "nobody/model"
        assert settings(tmp_path / name)["revision"] == "abc"
        assert ("no tokenizer" in told.get("warning", "")) == (given is None)
    source = save_adapter(tmp_path / "local-run", base, base_model_name_or_path=str(base))
    export(source, tmp_path / "out", to="peft")
    assert settings(tmp_path / "out")["base_model_name_or_path"] is None
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "run", save_base(tmp_path / "base"))
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save(tensors, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    export(source, tmp_path / "out", to="peft")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), FormatError, "json:1: not JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), FormatError, "has no adapter_config"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), FormatError, "not a whole"),
        (
            lambda f: (f / "adapter_config.json").write_text(
                (f / "adapter_config.json").read_text().replace("CAUSAL_LM", "TOKEN_CLS")
            ),
            RunError,
            "is for TOKEN_CLS",
        ),
        (lambda f: (f / "recipe.yaml").write_text("model: x\ndata: y\n"), RunError, "not finished"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(tmp_path, damage, error, says) -> None:
    source = save_adapter(tmp_path / "run", save_base(tmp_path / "base"))
    damage(source)
    with pytest.raises(error, match=says):
        export(source, tmp_path / "out", to="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
