"""The Chinese instructions from their file to scored answers, by the commands of a user."""

import json
from pathlib import Path

import pytest
from tests.language.models import make_model
from tests.train.conftest import Command

CHINESE = Path(__file__).parent / "data" / "chinese.json"
LOST = "\N{REPLACEMENT CHARACTER}"


def test_a_chinese_file_is_trained_on_and_scored_by_characters(
    deltaw_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = make_model(tmp_path / "model", positions=1024), tmp_path / "run"
    capsys.readouterr()
    given = ["template=qwen", "max_steps=6", "batch_size=4", "learning_rate=0.02"]
    scored = ["metric=chrf", "max_new_tokens=8", "samples=2", "validation_share=0.2"]
    code, out, err = deltaw_command("train", model, CHINESE, *given, *scored, "-o", run)
    assert (code, err) == (0, "")
    assert "instructions: " in out and "template  qwen" in out
    assert "BLEU and NIST count characters, as sacrebleu's tokenizer zh has them" in _joined(out)
    results = json.loads((run / "results.json").read_text("utf-8"))
    assert results["after"]["values"]["loss"] < results["before"]["values"]["loss"]
    assert results["after"]["primary"] == "chrf"

    code, out, err = deltaw_command("eval", run, CHINESE, "--generate")
    assert (code, err) == (0, "")
    assert "BLEU and NIST count characters, as sacrebleu's tokenizer zh has them" in _joined(out)
    rows = json.loads(CHINESE.read_text("utf-8"))
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["references"] for row in answers] == [[row["output"]] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert answer["prompt"].endswith(_asked(row))

    code, _, err = deltaw_command("export", run, tmp_path / "out", "--to", "peft")
    assert (code, err) == (0, "")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert LOST not in card and "chinese.json" in card


def _joined(out: str) -> str:
    return " ".join(out.split())


def _asked(row: dict[str, str]) -> str:
    """The question as Qwen's template opens an answer."""
    words = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
