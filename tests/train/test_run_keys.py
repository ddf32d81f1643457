"""Keys that nothing reads once the data say what a run is for."""

from pathlib import Path

import pytest

from deltaw.errors import ConfigError
from deltaw.train.recipe import parse
from deltaw.train.run import train
from deltaw.train.runfolder import RunFolder, read_recipe


@pytest.mark.parametrize("key", [{"max_samples": 10}, {"eval_data": "other.csv"}])
def test_a_language_models_key_is_refused_before_a_classifier_is_trained(
    tiny: Path, tmp_path: Path, key: dict[str, object]
) -> None:
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), **key}
    (name,) = key
    with pytest.raises(ConfigError, match=f"{name}=.* has no effect with task=classification"):
        train(parse(values | {"output": str(tmp_path / "out")}), silent=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_such_a_key_already_is_read(tmp_path: Path) -> None:
    values = {"model": "m", "data": "d.csv", "max_samples": 10}
    record = {"chosen": {"task": "classification"}}
    RunFolder(tmp_path).write_recipe(parse(values | {"record": record}))
    found = read_recipe(tmp_path)
    assert (found.task, found.max_samples) == ("classification", 10)
