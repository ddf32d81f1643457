"""`--to hf`: the merged model is the base plus ΔW, and a wrong one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_models import config, logits, save_adapter, save_base, tokenizer, tokens, with_peft
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from deltaw.errors import ConfigError, FormatError, MergeError, RunError
from deltaw.export import export, hf


def delta(adapter: Path, path: str, scale: float) -> torch.Tensor:
    """ΔW of a layer in float64, from the file."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    return scale * B @ A


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_merged_weights_are_the_base_and_delta(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind)
    paths = {"gpt2": "transformer.h.1.attn.c_attn", "llama": "model.layers.1.self_attn.q_proj"}
    source = save_adapter(tmp_path / "run", base, target_modules=[paths[kind]])
    told = export(source, tmp_path / "out", to="hf", base=str(base))
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    key = f"{paths[kind]}.weight"
    moved = delta(source, paths[kind], 7 / 3)
    wanted = before[key].double() + (moved.T if kind == "gpt2" else moved)
    torch.testing.assert_close(after[key].double(), wanted, atol=1e-6, rtol=1e-6)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(with_peft(base, source)))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "probe tokens" in told["checked"] and type(merged).__name__ in told["next"]


def test_generation_settings_go_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = transformers.GenerationConfig(eos_token_id=2, max_new_tokens=17)
    settings.save_pretrained(base)
    source = save_adapter(tmp_path / "run", base)
    export(source, tmp_path / "out", to="hf", base=str(base))
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 17


TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }}<turn>\n{% endfor %}"


def test_the_model_stops_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    """The base knows its EOS alone; a template of chats ends answers with another token."""
    base = save_base(tmp_path / "base")
    speaker = tokenizer(TURNS)
    speaker.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    speaker.save_pretrained(base)
    source = save_adapter(tmp_path / "run", base)
    told = export(source, tmp_path / "out", to="hf", base=str(base))
    assert told["stops"] == "at <turn> too, which ends an answer in the chat template"
    end = speaker.convert_tokens_to_ids("<turn>")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, end]
    transformers.GenerationConfig(eos_token_id=[2, end]).save_pretrained(base)
    told = export(source, tmp_path / "again", to="hf", base=str(base))
    assert "stops" not in told


@pytest.mark.parametrize(("asked", "found"), [(None, "bfloat16"), ("float32", "float32")])
def test_the_dtype_is_the_bases_or_the_one_asked_for(tmp_path: Path, asked, found) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    source = save_adapter(tmp_path / "run", base)
    told = export(source, tmp_path / "out", to="hf", base=str(base), dtype=asked)
    assert found in told["written"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{found}"}
    path = "model.layers.0.mlp.up_proj"
    W = load_file(base / "model.safetensors")[f"{path}.weight"].double()
    wanted = W + delta(source, path, 7 / 3)
    torch.testing.assert_close(
        weights[f"{path}.weight"].double(), wanted, rtol=2**-8 if asked is None else 1e-6, atol=1e-6
    )


def test_a_wrong_merge_is_refused_with_the_number(tmp_path: Path, monkeypatch) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)

    def forget(model: Any, **settings: Any) -> None:
        """Merge nothing."""

    monkeypatch.setattr(hf.deltaw, "merge", forget)
    with pytest.raises(RunError, match=r"differ from the adapter's by up to \d\.\d+e[+-]\d+"):
        export(source, tmp_path / "out", to="hf", base=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_rounding_that_takes_what_the_adapter_gives_is_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    source = save_adapter(tmp_path / "run", base, lora_alpha=0.003)
    told = export(source, tmp_path / "out", to="hf", base=str(base))
    assert "--dtype float32" in told["warning"]
    told = export(source, tmp_path / "wide", to="hf", base=str(base), dtype="float32")
    assert "warning" not in told


def test_tied_weights_are_not_changed_in_silence(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    source = save_adapter(tmp_path / "run", base, target_modules=["embed_tokens"])
    with pytest.raises(MergeError, match="tied"):
        export(source, tmp_path / "out", to="hf", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_classifier_gets_its_labels_from_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification
    model = classifier.from_config(config("llama", num_labels=5))
    model.save_pretrained(tmp_path / "five")
    model.model.save_pretrained(tmp_path / "headless")
    settings = json.loads((tmp_path / "headless" / "config.json").read_text())
    del settings["id2label"], settings["label2id"]
    (tmp_path / "headless" / "config.json").write_text(json.dumps(settings))
    source = save_adapter(tmp_path / "run", tmp_path / "five", task="SEQ_CLS", auto=classifier)
    export(source, tmp_path / "out", to="hf", base=str(tmp_path / "five"))
    merged = classifier.from_pretrained(tmp_path / "out")
    wanted = logits(with_peft(tmp_path / "five", source, classifier))
    assert wanted.shape == (len(tokens()), 5)
    torch.testing.assert_close(logits(merged), wanted)
    export(source, tmp_path / "new", to="hf", base=str(tmp_path / "headless"))
    torch.testing.assert_close(logits(classifier.from_pretrained(tmp_path / "new")), wanted)


@pytest.mark.parametrize("whole", [True, False])
def test_without_a_task_the_base_decides(tmp_path: Path, whole: bool) -> None:
    base = save_base(tmp_path / "base")
    auto = transformers.AutoModelForCausalLM if whole else transformers.AutoModel
    source = save_adapter(tmp_path / "run", base, task=None, auto=auto)
    export(source, tmp_path / "out", to="hf", base=str(base))
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert merged.architectures == ["LlamaForCausalLM" if whole else "LlamaModel"]
    wanted = logits(with_peft(base, source, auto))
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "out")), wanted)


def test_a_run_of_a_classifier_merges_as_the_run_predicts(finished: Path, tmp_path: Path) -> None:
    from deltaw.train.opened import open_run

    export(finished, tmp_path / "out", to="hf")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.randint(5, 40, (3, 9))
    run = open_run(finished)
    with torch.no_grad():
        wanted, answer = run.model(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    torch.testing.assert_close(answer, wanted)
    assert tuple(merged.config.id2label.values()) == run.labels
    told = export(finished, tmp_path / "half", to="hf", dtype="bfloat16")
    assert "in bfloat16" in told["written"]
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in merged.state_dict().items():
        assert torch.equal(half[name], weight.bfloat16())


def test_a_base_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    other = save_base(tmp_path / "other", hidden_size=32)
    cases: list[tuple[Any, type[Exception], str]] = [
        (other, FormatError, "layers.0"),
        (tmp_path / "nowhere", RunError, "cannot be loaded"),
        (None, RunError, "does not say which model"),
    ]
    for given, error, says in cases:
        with pytest.raises(error, match=says):
            export(source, tmp_path / "out", to="hf", base=str(given) if given else None)
    headless = transformers.AutoModel.from_pretrained(base)
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(RunError, match=r"lacks weights of .*\n  - lm_head.weight"):
        export(source, tmp_path / "out", to="hf", base=str(tmp_path / "headless"))
    with pytest.raises(ConfigError, match="no dtype 'int3'"):
        export(source, tmp_path / "out", to="hf", base=str(base), dtype="int3")
    assert not (tmp_path / "out").exists()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_base_runs_only_where_it_is_trusted(
    tmp_path: Path, deltaw_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    (base / "own.py").write_text(CODE)
    settings = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings |= {"model_type": "own", "auto_map": own}
    (base / "config.json").write_text(json.dumps(settings))
    asked = ("export", source, tmp_path / "out", "--to", "hf", "--base", base)
    code, _, err = deltaw_command(*asked)
    assert code == 1 and "cannot be loaded" in err and not (tmp_path / "out").exists()
    code, out, err = deltaw_command(*asked, "--trust-remote-code")
    assert code == 0 and "OwnModel in float32" in out, err
