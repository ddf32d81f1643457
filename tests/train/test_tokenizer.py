"""A tokenizer that lost its files is refused, where a model is trained and where a run is used."""

import json
import shutil
from pathlib import Path

import pytest
from tests.train.models import messages, write_csv

from deltaw.errors import RunError
from deltaw.train.opened import open_run
from deltaw.train.recipe import parse
from deltaw.train.run import train


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the model."""
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def start(model: Path, data: Path, output: Path) -> Path:
    values = {"model": str(model), "data": str(data), "output": str(output), "max_steps": 1}
    return train(parse(values), silent=True)


def lose_vocabulary(folder: Path) -> None:
    """Delete the vocabulary of a tokenizer for which transformers then makes one up."""
    (folder / "tokenizer.json").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8")) | {"tokenizer_class": "BertTokenizer"}
    file.write_text(json.dumps(config), "utf-8")


def change_vocabulary(folder: Path) -> None:
    """Give two ordinary words each other's numbers."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    first, second = (word for word, number in words.items() if number in (30, 31))
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(content), "utf-8")


def test_a_model_without_its_tokenizer_is_refused(model: Path, tiny: Path, tmp_path: Path) -> None:
    lose_vocabulary(model)
    with pytest.raises(RunError, match="has no vocabulary") as caught:
        start(model, tiny / "data.csv", tmp_path / "run")
    assert "copy them there from where the model came from" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_texts_of_which_nothing_is_known_are_refused(tiny: Path, tmp_path: Path) -> None:
    unknown = [chr(0x410 + n) for n in range(30)]
    rows = [
        (f"{a}{b}{a} {b}", label) for a, label in zip("абвг", "xyxy", strict=True) for b in unknown
    ]
    data = write_csv(tmp_path / "data.csv", rows)
    with pytest.raises(RunError, match="knows nothing in any of the texts"):
        start(tiny / "model", data, tmp_path / "run")


def test_a_run_that_lost_its_tokenizer_is_refused(run: Path) -> None:
    lose_vocabulary(run)
    with pytest.raises(RunError, match="has no vocabulary"):
        open_run(run)


def test_a_run_with_another_tokenizer_is_refused_until_it_has_its_own(
    run: Path, tiny: Path
) -> None:
    change_vocabulary(run)
    with pytest.raises(RunError, match="not the one that this run was trained with") as caught:
        open_run(run)
    assert f"copy them again from the base model ({tiny / 'model'})" in str(caught.value)
    shutil.copy(tiny / "model" / "tokenizer.json", run)
    open_run(run)


def test_a_run_does_not_go_on_with_another_tokenizer(model: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", messages(40))
    run = start(model, data, tmp_path / "run")
    (run / "results.json").unlink()
    change_vocabulary(model)
    with pytest.raises(RunError, match="the model's tokenizer changed since the run began"):
        start(model, data, run)
