"""`deltaw export`: what it says, what it refuses, and the card that it writes."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
import yaml
from language_models import save_adapter, save_base
from safetensors.torch import load_file

from deltaw.cli.app import app
from deltaw.errors import ConfigError, RunError
from deltaw.export import export, names


def card(folder: Path) -> tuple[dict[str, object], str]:
    """The header and the text of a model card."""
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_targets_are_the_files_of_the_folder() -> None:
    assert names() == ["gguf", "hf", "mlx", "ollama", "peft", "vllm"]
    order = [command.callback.__name__ for command in app.registered_commands]
    assert order[order.index("merge") + 1] == "export"


def test_a_run_is_exported_by_its_folder_alone(finished: Path, tmp_path: Path, deltaw_command):
    code, out, err = deltaw_command("export", finished, tmp_path / "out", "--to", "hf")
    assert code == 0, err
    for line in ("exported  ", "written   Bert", "checked   largest", "adapter   moves", "next  "):
        assert f"\n{line}" in f"\n{out}"
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_a_run_follows_its_base_that_moved(finished: Path, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    moved = tmp_path / "moved"
    shutil.copytree(tiny / "model", moved)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny / "model"), "/nowhere/at/all"))
    with pytest.raises(RunError, match="no longer at /nowhere"):
        export(run, tmp_path / "out", to="hf")
    export(run, tmp_path / "out", to="hf", base=str(moved))
    assert "/nowhere" not in (tmp_path / "out" / "README.md").read_text()


def test_the_hub_name_of_a_run_is_that_of_its_recipe(
    finished: Path, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = (run / "recipe.yaml").read_text()
    name = "model: nobody/encoder\nrevision: r2"
    (run / "recipe.yaml").write_text(recipe.replace(f"model: {tiny / 'model'}", name))
    export(run, tmp_path / "out", to="peft", base=str(tiny / "model"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "nobody/encoder"
    assert written["revision"] == "r2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "onnx"], "no target 'onnx'. Fix: use gguf, hf, mlx, ollama, peft, vllm"),
        (["--to", "peft", "--dtype", "float32"], "dtype is for merged models, not for peft"),
        (["--to", "hf", "--ollama-base", "x"], "ollama_base is for ollama, not for hf"),
        (["--to", "ollama", "--ollama-base", "x", "--dtype", "float32"], "nothing is merged"),
        (["--to", "vllm"], "not for a language model"),
    ],
)
def test_a_refusal_is_one_message(finished, tmp_path, deltaw_command, arguments, says) -> None:
    code, out, err = deltaw_command("export", finished, tmp_path / "out", *arguments)
    assert code == 1 and out == "" and says in err and "Fix: " in err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(finished, tmp_path / "empty", to="peft")
    before = {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("kept")
    for name in ("empty", "file"):
        with pytest.raises(RunError, match="is not empty"):
            export(finished, tmp_path / name, to="peft")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()}
    assert (tmp_path / "file").read_text() == "kept"


def test_what_is_interrupted_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaw.export.card", stop)
    with pytest.raises(KeyboardInterrupt):
        export(finished, tmp_path / "out", to="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trained_the_weights_has_no_adapter(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = (run / "recipe.yaml").read_text()
    keys = ("method", "record", "model", "data", "seed", "max_steps")
    kept = {key: value for key, value in yaml.safe_load(recipe).items() if key in keys}
    kept["record"]["chosen"].pop("lora_alpha")
    (run / "recipe.yaml").write_text(yaml.safe_dump(kept | {"method": "full"}))
    with pytest.raises(RunError, match="there is no adapter"):
        export(run, tmp_path / "out", to="hf")
    (run / "results.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        export(run, tmp_path / "out", to="hf")


def test_the_card_tells_where_a_run_comes_from(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "out", to="hf")
    header, body = card(tmp_path / "out")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["deltaw", "lora"],
    }
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    results = json.loads((finished / "results.json").read_text())
    (name, digest), *_ = recipe["record"]["data"].items()
    assert f"| data | {name}, sha256 {digest} |" in body
    after, before = (results[part]["values"]["accuracy"] for part in ("after", "before"))
    assert f"| accuracy on validation | {after:.4f} (95%: " in body
    assert f"before training {before:.4f} |" in body
    assert "| method | lora, r=8 lora\\_alpha=16 |" in body
    trained = sum(t.numel() for t in load_file(finished / "adapter_model.safetensors").values())
    assert f"| parameters | {trained:,} in 14 modules |" in body
    block = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["max_steps"] == 6
    assert yaml.safe_load(block)["model"] == "model"
    assert str(finished.parent) not in body and recipe["model"] not in body


def test_text_from_files_is_no_markup_in_the_card(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    evil = "x|<img src=a>\n---\nlicense: mit\n# `[a](b)`"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["record"]["data"] = {evil: "0" * 64}
    recipe["label"] = "````\n# broken"
    recipe["record"]["chosen"].pop("label")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = json.loads((run / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "nobody/model: [x]\n- y"
    (run / "adapter_config.json").write_text(json.dumps(settings))
    export(run, tmp_path / "out", to="peft")
    header, body = card(tmp_path / "out")
    assert header["base_model"] == "nobody/model: [x]\n- y" and "license" not in header
    line = next(line for line in body.splitlines() if line.startswith("| data |"))
    assert (
        "x\\|\\<img src=a\\>\\\\n---\\\\nlicense: mit\\\\n\\# \\`\\[a\\](b)\\`, sha256 000" in line
    )
    assert "\n# broken" not in body.split("`````yaml")[0] and body.rstrip().endswith("`````")
    assert body.count("\n`````") == 2


def test_the_card_of_a_bare_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, base_model_name_or_path="nobody/m", revision="r1")
    told = export(source, tmp_path / "out", to="vllm", base=str(base))
    assert "--revision" not in told["next"]  # it is that of the hub's, not of a folder
    header, body = card(tmp_path / "out")
    assert header["base_model"] == "nobody/m" and header["library_name"] == "peft"
    assert header["pipeline_tag"] == "text-generation"
    assert "| base | nobody/m at r1 |" in body and "Recipe" not in body


def test_an_unknown_target_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no target '\.\./hf'"):
        export(tmp_path / "nowhere", tmp_path / "out", to="../hf")
