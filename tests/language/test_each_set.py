"""The validation loss of each data set is that of a run that is judged by this set alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.models import conversations, write_json

from deltaw.errors import ConfigError
from deltaw.language.choosing import train
from deltaw.train.recipe import parse


def evaluations(run: Path, name: str) -> list[float]:
    events = map(json.loads, (run / "log.jsonl").read_text("utf-8").splitlines())
    return [event[name] for event in events if name in event]


@pytest.fixture
def values(talker: Path, tmp_path: Path) -> dict[str, Any]:
    rows = conversations(40)
    write_json(tmp_path / "train.json", rows[:24])
    write_json(tmp_path / "few.json", rows[24:27])
    write_json(tmp_path / "many.json", rows[27:])
    return {
        "model": str(talker / "model"),
        "data": str(tmp_path / "train.json"),
        "max_steps": 4,
        "eval_every": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "samples": 0,
    }


def test_each_set_has_its_own_loss(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(tmp_path / "few.json"), str(tmp_path / "many.json")]

    def run(name: str, eval_data: str, **more: Any) -> Path:
        output = str(tmp_path / name)
        return train(parse(values | {"eval_data": eval_data, "output": output} | more))

    both = run("both", ",".join(sets), eval_on_each_dataset=True)
    out = capsys.readouterr().out.replace("\n", "")
    for one in sets:
        assert out.count(f" of {one}") == len(evaluations(both, f"eval_{one}_loss")) >= 2
    assert not evaluations(run("plain", ",".join(sets)), f"eval_{sets[0]}_loss")
    for number, one in enumerate(sets):
        alone = evaluations(run(str(number), one), "eval_loss")
        assert len(alone) >= 2
        assert evaluations(both, f"eval_{one}_loss") == pytest.approx(alone, rel=1e-6)
    capsys.readouterr()
    assert evaluations(both, f"eval_{sets[0]}_loss") != evaluations(both, f"eval_{sets[1]}_loss")


def test_without_validation_rows_there_is_nothing_to_judge(values: dict[str, Any]) -> None:
    recipe = parse(values | {"validation_share": 0, "eval_on_each_dataset": True})
    with pytest.raises(ConfigError, match="eval_on_each_dataset=True needs validation rows"):
        train(recipe)


def test_preferences_do_not_read_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="eval_on_each_dataset=True has no effect with task=dpo"):
        parse(values | {"task": "dpo", "eval_on_each_dataset": True})
