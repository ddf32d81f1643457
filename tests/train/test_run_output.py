"""Where a run goes, and what it must not replace there."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from deltaw.errors import RunError
from deltaw.train import run as job
from deltaw.train.recipe import load, parse
from deltaw.train.run import train


@pytest.fixture
def values(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "output": str(tmp_path / "run"),
        "max_steps": 1,
    }


def start(values: dict[str, Any], *, overwrite: bool = False, dry_run: bool = False) -> Path:
    return train(parse(values), silent=True, overwrite=overwrite, dry_run=dry_run)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("key", "source"),
    [("model", "RUN"), ("model", "."), ("data", "data.csv"), ("data", "../link/data.csv")],
)
def test_what_a_run_is_made_from_is_never_overwritten_by_it(
    values: dict[str, Any],
    finished: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    source: str,
    overwrite: bool,
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(tiny / "data.csv", run)
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    before = content(run)
    source = source.replace("RUN", str(run))
    with pytest.raises(RunError, match="what it is made from lies in there") as caught:
        start(values | {key: source}, overwrite=overwrite)
    assert f"{key} {source}\nFix: choose another folder" in str(caught.value)
    assert content(run) == before


def test_a_dry_run_refuses_a_folder_that_the_run_would_refuse(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "restore", broken)
        start(values)
    run = Path(values["output"])
    before = content(tmp_path)
    with pytest.raises(RunError, match="seed was 0, is now 3"):
        start(values | {"seed": 3}, dry_run=True)
    start(values | {"seed": 3}, dry_run=True, overwrite=True)
    start(values, dry_run=True)
    assert content(tmp_path) == before
    start(values)
    with pytest.raises(RunError, match="holds a finished run"):
        start(values, dry_run=True)
    start(values, dry_run=True, overwrite=True)
    (run / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="holds other files"):
        start(values, dry_run=True)
    with pytest.raises(RunError, match="cannot be written"):
        start(values | {"output": str(run / "results.json")}, dry_run=True)


def test_a_runs_own_recipe_leads_to_its_own_folder_from_anywhere(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(values | {"output": "run"})
    monkeypatch.chdir(run)
    with pytest.raises(RunError, match=f"{tmp_path / 'run'} holds a finished run"):
        train(load(Path("recipe.yaml")), silent=True)
