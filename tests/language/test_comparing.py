"""Finished runs on judged answers, whatever they were trained on, with their base as reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.language.models import conversations, write_json
from tests.language.test_ratings import ratings
from tests.train.conftest import Command

from deltaw.errors import RunError
from deltaw.language.choosing import train
from deltaw.language.use.evaluating import evaluate_run
from deltaw.train.recipe import parse


def pairs(numbers: range, before: str = "") -> list[dict[str, str]]:
    return [
        {
            "prompt": f"{before}The colour number {n}? ",
            "chosen": "It is blue.",
            "rejected": f"No idea {n}.",
        }
        for n in numbers
    ]


@pytest.fixture(scope="module")
def values(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compared")
    write_json(folder / "pairs.json", pairs(range(24)))
    write_json(folder / "fresh.json", pairs(range(30, 36)))
    write_json(folder / "ratings.json", ratings(20))
    return {
        "model": str(talker / "model"),
        "data": str(folder / "pairs.json"),
        "validation_share": 4,
        "max_steps": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "samples": 0,
    }


def run_of(values: dict[str, Any], folder: Path, **more: Any) -> Path:
    asked = {k: v for k, v in values.items() if k != "samples"} | more
    return train(parse(asked | {"output": str(folder / "run")}))


def rows(out: str) -> dict[str, list[float]]:
    """The table: base, run, and the interval of the run."""
    lines = [line.replace(" to ", " ").split() for line in out.splitlines()]
    found = {}
    for name, *numbers in (line for line in lines if len(line) == 5):
        try:
            found[name] = [float(number) for number in numbers]
        except ValueError:
            continue
    return found


def test_a_run_of_preferences(
    values: dict[str, Any], tmp_path: Path, deltaw_command: Command
) -> None:
    run = run_of(values, tmp_path, pref_loss="ipo", pref_beta=0.2)
    after = json.loads((run / "results.json").read_text())["after"]
    for more in ([], ["--no-merge"]):
        code, out, err = deltaw_command("eval", run, *more)
        assert (code, err) == (0, "")
        table = rows(out)
        assert set(table) == {"loss", "accuracy", "margin", "prefers"}
        for name, (_, own, low, high) in table.items():
            assert own == pytest.approx(after["values"][name], abs=6e-4)
            assert [low, high] == pytest.approx(after["intervals"][name], abs=6e-4)
        assert table["loss"][0] == pytest.approx((1 / 0.4) ** 2, abs=1e-3)
        assert (table["accuracy"][0], table["margin"][0]) == (0.5, 0.0)
    assert "4 pairs of the validation part that were not trained on" in out
    assert "loss=ipo at pref_beta=0.2; the reference is the model before the run" in out
    fresh = Path(values["data"]).with_name("fresh.json")
    code, out, _ = deltaw_command("eval", run, fresh)
    assert code == 0 and "6 pairs" in out and "WARNING" not in out
    many = write_json(tmp_path / "many.json", [*pairs(range(6)), *pairs(range(6), "Why? " * 99)])
    code, out, _ = deltaw_command("eval", run, many)
    assert code == 0 and "6 pairs" in out and "log.jsonl" not in out
    assert out.count(f"skipped {many}:") == 6 and out.count("the answer lies beyond") == 6
    code, out, _ = deltaw_command("eval", run, values["data"])
    assert "WARNING   20 of these rows were trained on; the score flatters the run" in out
    code, out, _ = deltaw_command("eval", run, Path(values["data"]).with_name("ratings.json"))
    assert code == 0 and "20 rated answers" in out and set(rows(out)) >= {"auc", "kl"}
    texts = write_json(tmp_path / "texts.json", conversations(4))
    code, out, _ = deltaw_command("eval", run, texts)
    assert code == 0 and "loss of the run less the base's" in out


def test_a_run_of_ratings(values: dict[str, Any], tmp_path: Path, deltaw_command: Command) -> None:
    run = run_of(values, tmp_path, data=str(Path(values["data"]).with_name("ratings.json")))
    after = json.loads((run / "results.json").read_text())["after"]["values"]
    code, out, err = deltaw_command("eval", run)
    assert (code, err) == (0, "")
    assert {name: row[1] for name, row in rows(out).items()} == {
        name: pytest.approx(value, abs=6e-4) for name, value in after.items()
    }
    assert "the loss of KTO at pref_beta=0.1" in out


def test_a_run_of_answers_is_compared_with_its_base(
    values: dict[str, Any], tmp_path: Path, talker: Path
) -> None:
    run = run_of(values, tmp_path, data=str(talker / "data.json"), samples=0)
    found = evaluate_run(run, values["data"])
    assert found.rows == 24 and found.values["margin"] != 0
    assert found.values["loss"] != pytest.approx(np.log(2), abs=1e-3)


def test_a_model_trained_in_full_is_compared_with_the_model_it_was(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(values, tmp_path, method="full", learning_rate=1e-3)
    after = json.loads((run / "results.json").read_text())["after"]
    found = evaluate_run(run, None)
    assert found.values == pytest.approx(after["values"], abs=1e-5)
    (tmp_path / "moved").mkdir()
    with pytest.raises(RunError, match=r"cannot be loaded|moved"):
        evaluate_run(run, None, model=str(tmp_path / "moved"))


def test_what_cannot_be_compared_is_said(values: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(values, tmp_path, init_lora_weights="pissa", absorb=True, max_steps=1, r=2)
    with pytest.raises(RunError, match=r"what the model said then is not kept.*\n?.*results.json"):
        evaluate_run(run, None)
    long = write_json(
        tmp_path / "long.json", [row | {"prompt": "x " * 200} for row in pairs(range(3))]
    )
    with pytest.raises(
        RunError, match=r"There is nothing to score.\n.*128 fit, and the answer lies beyond"
    ):
        evaluate_run(run, str(long))
