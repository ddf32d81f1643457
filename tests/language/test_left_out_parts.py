"""What does not fit is named of every part: in the receipt, in the report, and in the log."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import write_rows
from tests.train.conftest import Command

from deltaw.language.choosing import train
from deltaw.train.recipe import parse

LONG = "word " * 60


def answers(kind: str, start: int, count: int, long: int) -> list[dict[str, str]]:
    """Rows of which the first few are too long, as answers or as pairs of them."""
    rows = []
    for n in range(start, start + count):
        text = f"Answer {n}." + LONG * (n < start + long)
        rows.append({"instruction": f"{n}?", "output": text})
    if kind == "sft":
        return rows
    return [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": "No."}
        for row in rows
    ]


def files(folder: Path, kind: str) -> tuple[str, str]:
    train_file = write_rows(folder / "a.jsonl", answers(kind, 0, 20, 8))
    held_file = write_rows(folder / "e.jsonl", answers(kind, 50, 5, 3))
    return str(train_file), str(held_file)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_names_and_logs_what_it_leaves_out(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    data, held = files(tmp_path, kind)
    values: dict[str, Any] = {
        "model": str(talker / "model"),
        "data": data,
        "eval_data": held,
        "too_long": "drop",
        "max_steps": 1,
        "batch_size": 4,
        "output": str(tmp_path / "run"),
    }
    run = train(parse(values))
    out = capsys.readouterr().out
    assert "skipped 3 more; a run lists all in its log.jsonl" in out
    for line in (1, 2, 3):
        assert f"validation: skipped {held}:{line}: " in out
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    left = [(e["file"], e["line"]) for e in events if e["event"] == "skipped"]
    assert left == [(data, n) for n in range(1, 9)] + [(held, n) for n in range(1, 4)]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_report_names_what_it_leaves_out(
    deltaw_command: Command, talker: Path, tmp_path: Path, kind: str
) -> None:
    data, held = files(tmp_path, kind)
    words = ("data", data, f"eval_data={held}", "--model", talker / "model", "--samples", "0")
    code, out, err = deltaw_command(*words, "too_long=drop")
    assert (code, err) == (0, "")
    assert f"held out  validation: 3 samples left out:\n          {held}:1: " in out
    assert "held out  validation: 3 cut" in deltaw_command(*words)[1]
