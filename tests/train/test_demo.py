"""What the demo does with a folder that is in use; its training is that of `deltaw train`."""

from pathlib import Path
from typing import Any

import pytest
from tests.train.models import make_model, messages, write_csv

from deltaw.demo import run as demo
from deltaw.errors import RunError
from deltaw.train import run as job
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import train
from deltaw.train.runfolder import read_recipe, read_results


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The methods trained by a demo on a tiny model and table, and whether a run made way."""
    calls: list[tuple[str, bool]] = []
    data = tmp_path / "messages"
    data.mkdir()
    write_csv(data / "train.csv", messages(40))
    write_csv(data / "test.csv", messages(60, seed=1)[40:])
    model = make_model(tmp_path / "model")

    def spy(recipe: Recipe, *, overwrite: bool, silent: bool) -> Path:
        calls.append((recipe.method, overwrite))
        return train(recipe, overwrite=overwrite, silent=True)

    monkeypatch.setattr(demo, "MESSAGES", data)
    monkeypatch.setattr(demo, "model_folder", lambda: model)
    monkeypatch.setattr(demo, "train", spy)
    return calls


@pytest.mark.parametrize("own", [{"r": 4}, {"data": "own.csv"}])
def test_a_persons_run_is_refused_before_anything_is_trained(
    trained: list[tuple[str, bool]], tmp_path: Path, own: dict[str, Any]
) -> None:
    write_csv(tmp_path / "own.csv", messages(40))
    values = {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / own.pop("data", "messages")),
        "output": str(tmp_path / "demo" / "head"),
        "max_steps": 1,
    }
    run = train(parse(values | own), silent=True)
    before = (run / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match="head holds a run that is not the demo's") as caught:
        demo.run_demo(tmp_path / "demo", 1)
    assert "another folder with --output" in str(caught.value)
    assert trained == []
    assert (run / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["head"]


def test_an_earlier_demo_makes_way_and_an_interrupted_one_goes_on(
    trained: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for steps in (2, 2, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(job, "restore", interrupt)
            demo.run_demo(tmp_path / "demo", steps)
    assert trained == [("lora", False), ("lora", False), ("lora", True)]
    trained.clear()
    demo.run_demo(tmp_path / "demo", 1)
    assert trained == [("lora", False), ("full", False), ("head", False)]
    trained.clear()
    demo.run_demo(tmp_path / "demo", 2)
    assert trained == [("lora", True), ("full", True), ("head", True)]
    assert read_recipe(tmp_path / "demo" / "full").max_steps == 2
    assert read_results(tmp_path / "demo" / "head")
