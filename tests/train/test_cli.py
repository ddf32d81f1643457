"""The command line as a person uses it."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tests.train.conftest import Command
from tests.train.models import events, messages, write_csv

import deltaw

HEAVY = ("torch", "transformers", "numpy", "datasets", "yaml", "safetensors")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [(["--help"], [*HEAVY, "pydantic"]), (["train", "--help"], HEAVY)],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: list[str]) -> None:
    code = (
        f"import sys; from deltaw.cli import main; sys.argv=['deltaw', *{arguments}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    assert "Usage" in found.stdout


def test_the_package_is_a_command_that_tells_its_version() -> None:
    command = [sys.executable, "-m", "deltaw", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == (
        f"deltaw {deltaw.__version__} (torch {torch.__version__}, "
        f"transformers {transformers.__version__}, trl {version('trl')})\n"
    )


def test_dry_run_shows_receipt_and_recipe_and_writes_nothing(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    code, out, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", output, "--dry-run", "epochs=2"
    )
    assert (code, err) == (0, "")
    assert not output.exists()
    for text in (
        "60 rows read: 54 training, 6 validation, 0 skipped",
        "3 classes: ",
        "0.0% of the rows truncated",
        "13 x linear at r=8 (query, key, value, dense) and 1 x trained in full (classifier)",
        "verify    passed",
        "8 of 16 rows, evaluated every 1; 2 epochs (as asked)",
        "LoRA Without Regret",
        "learning_rate: ",
        "epochs: 2",
    ):
        assert text in out


def test_the_dry_runs_recipe_gives_the_same_recipe(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    _, out, _ = deltaw_command("train", tiny / "model", tiny / "data.csv", "--dry-run")
    recipe = out[out.index("# The recipe") :]
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    _, again, _ = deltaw_command("train", tmp_path / "recipe.yaml", "--dry-run")
    assert again[again.index("# The recipe") :] == recipe


def test_a_recipe_may_be_json(deltaw_command: Command, tiny: Path, tmp_path: Path) -> None:
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "learning_rate": 1e-5}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(values, indent=2), encoding="utf-8")
    code, out, err = deltaw_command("train", recipe, "--dry-run")
    assert (code, err) == (0, "") and "learning_rate: 1.0e-05" in out
    recipe.write_text('{\n  "model": "m",\n  "model": "n"\n}', encoding="utf-8")
    code, _, err = deltaw_command("train", recipe, "--dry-run")
    assert code == 1 and "recipe.json:3" in err


def test_a_run_reports_before_and_after_and_what_to_type_next(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my run"
    code, out, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", output, "--max-steps", "2", "--r", "4"
    )
    assert (code, err) == (0, "")
    assert "before     after   95% interval" in out
    assert " kB, " in out
    assert f"deltaw predict '{output}'" in out
    assert {path.name for path in output.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
        "results.json",
        "log.jsonl",
        "tokenizer.json",
    }
    assert not list(output.glob("checkpoint-*"))
    said = "\n".join(str(event.get("text", "")) for event in events(output))
    assert all(line in said for line in out.splitlines())


def test_eval_predict_inspect_and_merge_need_only_the_folder(
    deltaw_command: Command, finished: Path, tmp_path: Path
) -> None:
    results = json.loads((finished / "results.json").read_text("utf-8"))
    for merge in ([], ["--no-merge"]):
        code, out, err = deltaw_command("eval", finished, *merge)
        assert (code, err) == (0, "")
        assert f"{results['after']['values']['accuracy']:.3f}" in out
        assert ("not merged" in out) == bool(merge)
    code, out, err = deltaw_command("predict", finished, "please cancel my order")
    assert (code, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines()} == {"cancel", "refund", "ship"}
    code, out, err = deltaw_command("inspect", finished)
    assert (code, err) == (0, "")
    assert "bert.encoder.layer.1.output.dense" in out
    assert "13 adapted layers" in out
    code, out, err = deltaw_command("merge", finished, tmp_path / "plain")
    assert (code, err) == (0, "")
    assert "largest difference of logits on 8 probe texts" in out
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert plain.config.id2label == {0: "cancel", 1: "refund", 2: "ship"}


def test_a_plain_model_is_written_in_the_dtype_asked_for(
    deltaw_command: Command, finished: Path, tmp_path: Path
) -> None:
    code, out, err = deltaw_command("merge", finished, tmp_path / "h", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "largest difference of logits" in out
    kind = transformers.AutoModelForSequenceClassification
    assert {p.dtype for p in kind.from_pretrained(tmp_path / "h").parameters()} == {torch.bfloat16}
    code, _, err = deltaw_command("merge", finished, tmp_path / "out", "--dtype", "int3")
    assert code == 1 and "no dtype 'int3' to write in. Fix: use float32, bfloat16, float16" in err


def test_predicting_a_file_writes_one_json_line_for_a_row(
    deltaw_command: Command, finished: Path, tmp_path: Path
) -> None:
    data = write_csv(
        tmp_path / "new.csv", [("refund me\x1b[31m", "?"), ("", "?"), ("ship it", "?")]
    )
    code, out, err = deltaw_command("predict", finished, data, "-o", tmp_path / "out.jsonl")
    assert (code, "\x1b" in out + err) == (0, False)
    assert 'new.csv:3: no text in "text"' in err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [2, 4]
    assert rows[0]["text"] == "refund me\x1b[31m"
    assert all(0 < row["probability"] <= 1 for row in rows)


def test_eval_of_other_data_and_of_changed_data(
    deltaw_command: Command, finished: Path, tmp_path: Path, tiny: Path
) -> None:
    other = write_csv(tmp_path / "other.csv", messages(10, seed=5))
    code, out, _ = deltaw_command("eval", finished, other)
    assert code == 0
    assert "10 rows" in out
    some = write_csv(tmp_path / "some.csv", [*messages(3, seed=5), ("", "ship")])
    out = deltaw_command("eval", finished, some)[1]
    assert "3 rows, 1 skipped" in out and f"skipped {some}:5: " in out
    unseen = write_csv(tmp_path / "unseen.csv", [("hello", "greeting"), ("ship it", "ship")])
    code, out, err = deltaw_command("eval", finished, unseen)
    assert (code, out) == (1, "")
    assert "unseen.csv:2" in err
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    changed = write_csv(tmp_path / "data.csv", messages(61))
    recipe = (copy / "recipe.yaml").read_text("utf-8")
    (copy / "recipe.yaml").write_text(recipe.replace(str(tiny / "data.csv"), str(changed)))
    code, _, err = deltaw_command("eval", copy)
    assert code == 1
    assert "The data changed since the run" in err


def test_inspecting_a_model_is_a_dry_run_without_weights(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny / "model" / "config.json", tmp_path / "bare")
    code, out, err = deltaw_command("inspect", tmp_path / "bare", "--targets", "query,value")
    assert (code, err) == (0, "")
    assert "4 linear" in out
    code, _, err = deltaw_command("inspect", tmp_path / "bare", "--targets", "querry")
    assert code == 1
    assert "query" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "MODEL"], "A model and data are needed"),
        (["train", "nowhere/at-all", "DATA"], "cannot be loaded"),
        (["train", "MODEL", "nowhere.csv"], "nowhere.csv"),
        (["train", "MODEL", "DATA", "--r", "0"], "r must be a whole number above 0"),
        (["train", "MODEL", "DATA", "--lora-alpha", "-1"], "lora_alpha must be a number above 0"),
        (["train", "MODEL", "DATA", "init_lora_weights=pisa"], "pissa_exact, pissa_niter_N"),
        (["train", "MODEL", "DATA", "init_lora_weights=pissa", "--r", "999"], "its rank of 999"),
        (["train", "MODEL", "DATA", "--lora-dropout", "1"], "lora_dropout must lie in [0, 1)"),
        (["train", "MODEL", "DATA", "--targets", "nope,query"], "'nope'"),
        (["train", "MODEL", "DATA", "--name", "../up"], "one plain folder name"),
        (["train", "MODEL", "DATA", "learning_rat=1"], "did you mean learning_rate"),
        (["train", "MODEL", "DATA", "metric=pearson"], "metric"),
        (["train", "MODEL", "DATA", "method=freeze", "last_layers=9"], "has 2 layers"),
        (["train", "MODEL", "DATA", "max_length=4000"], "max_length"),
        (["train", "recipe.yml"], "recipe.yml"),
        (["eval", "MODEL"], "not a run of deltaw"),
        (["predict", "MODEL", "text"], "not a run of deltaw"),
        (["merge", "MODEL", "out"], "not a run of deltaw"),
        (["inspect", "nowhere"], "cannot be loaded"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_nothing(
    deltaw_command: Command,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": tiny / "model", "DATA": tiny / "data.csv"}
    code, _, err = deltaw_command(*(names.get(a, a) for a in arguments))
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.rglob("*") if path.name != "runs"] == []


def test_an_unknown_model_type_is_one_error(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "\\u001b[31mno-such-type"}')
    code, _, err = deltaw_command("train", model, tiny / "data.csv", "-o", tmp_path / "run")
    assert (code, "\x1b" in err) == (1, False)
    assert "no-such-type" in err
    assert not (tmp_path / "run").exists()


def test_remote_code_in_a_run_folder_is_never_run(
    deltaw_command: Command, finished: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "recipe.yaml").read_text("utf-8").splitlines()
    lines = [f"model: {model}" if line.startswith("model:") else line for line in lines]
    (run / "recipe.yaml").write_text("\n".join([*lines, "trust_remote_code: true"]) + "\n")
    assert deltaw_command("predict", run, "hello")[0] == 1
    assert not (tmp_path / "ran").exists()


def test_merged_and_unmerged_logits_agree(finished: Path) -> None:
    from deltaw.train.batches import Collator
    from deltaw.train.opened import open_run
    from deltaw.train.reading import read
    from deltaw.train.scores import logits
    from deltaw.train.tokens import encode

    opened = open_run(finished)
    rows, _ = encode(opened.tokenizer, read(opened.recipe).train, opened.recipe.max_length)
    collator = Collator(opened.tokenizer)
    before = logits(opened.model, rows, collator)
    assert opened.merge() == "adapter merged into the weights"
    torch.testing.assert_close(logits(opened.model, rows, collator), before, atol=1e-5, rtol=1e-5)


def test_what_is_no_text_is_not_labelled(
    deltaw_command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_csv(tmp_path / "rows.csv", [("refund me", "?")])
    before = data.read_bytes()
    for arguments, message in (
        (["missing.csv"], "there is no file 'missing.csv'"),
        (["my rows.JSONL"], "there is no file 'my rows.JSONL'"),
        ([tmp_path], "is a folder"),
        ([""], "'' is blank"),
        ([" \t"], "is blank"),
        (["one", ""], "'' is blank"),
        ([data, "text"], "is a file; give it alone"),
        (["text", "-o", "out.jsonl"], "leave --output out"),
        ([data, "-o", data], "would replace it"),
        (["rows.csv", "-o", tmp_path / "sub" / ".." / "rows.csv"], "would replace it"),
    ):
        (tmp_path / "sub").mkdir(exist_ok=True)
        code, out, err = deltaw_command("predict", finished, *arguments)
        assert (code, out) == (1, "")
        assert message in err
    assert data.read_bytes() == before
    code, out, _ = deltaw_command("predict", finished, "the order is in missing.csv ")
    assert code == 0
    assert "refund" in out


def test_rows_that_were_trained_on_are_counted_when_they_are_scored(
    deltaw_command: Command, finished: Path, tiny: Path, tmp_path: Path
) -> None:
    code, out, _ = deltaw_command("eval", finished, tiny / "data.csv")
    assert code == 0
    assert "WARNING   54 of these rows were trained on" in out
    other = write_csv(tmp_path / "other.csv", [(f" {t} ", y) for t, y in messages(60)[:5]])
    known = deltaw_command("eval", finished, other)[1]
    assert "of these rows were trained on" in known
    new = write_csv(tmp_path / "new.csv", [("nobody wrote this before", "ship")])
    assert "WARNING" not in deltaw_command("eval", finished, new)[1]
    assert "WARNING" not in deltaw_command("eval", finished)[1]


@pytest.mark.parametrize("state", ["gone", "changed"])
def test_a_file_that_was_trained_on_is_known_when_the_runs_own_data_are_not_there(
    deltaw_command: Command, finished: Path, tiny: Path, tmp_path: Path, state: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = (run / "recipe.yaml").read_text("utf-8")
    own = tmp_path / "data.csv"
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny / "data.csv"), str(own)))
    if state == "changed":
        write_csv(own, messages(40, seed=9))
        assert "WARNING" not in deltaw_command("eval", run, own)[1]
    code, out, _ = deltaw_command("eval", run, tiny / "data.csv")
    assert code == 0
    assert "WARNING   this file is part of the run's data" in out


def test_a_base_that_has_moved_is_asked_for_by_the_option_that_finds_it(
    deltaw_command: Command, finished: Path, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = (run / "recipe.yaml").read_text("utf-8")
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny / "model"), "/gone/model"))
    for command in (["eval", run], ["predict", run, "hello"], ["merge", run, tmp_path / "plain"]):
        code, out, err = deltaw_command(*command)
        assert (code, out) == (1, "")
        assert "no longer at /gone/model" in err
        assert "--model" in err
        assert deltaw_command(*command, "--model", tiny / "model")[0] == 0


@pytest.mark.parametrize("command", ["eval", "predict", "merge"])
def test_outputs_that_are_no_numbers_are_an_error(
    deltaw_command: Command, finished: Path, tmp_path: Path, command: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    file = run / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in tensors:
        if name.endswith(("query.lora_B.weight", "key.lora_B.weight")):
            tensors[name] = torch.full_like(tensors[name], 1e30)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    more = {"eval": [], "predict": ["a refund, please"], "merge": [tmp_path / "plain"]}[command]
    code, out, err = deltaw_command(command, run, *more)
    assert code == 1
    assert "nan" not in out.lower()
    assert "The model's outputs are not finite for " in err
    assert not (tmp_path / "plain").exists()
