"""The folder of a run: what is not a run's is never touched."""

from pathlib import Path

import pytest

from deltaw.errors import RunError
from deltaw.train import staging
from deltaw.train.choices import by_name, full_data_name
from deltaw.train.recipe import parse
from deltaw.train.runfolder import RunFolder, read_results

OWN_RECIPE = "model: m\ndata: d.csv\n"


def content(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "years of work", ".partial-mine/x": "1", ".ready": "2", ".lock": "theirs"},
        {"config.json": "{}", "model.safetensors": ""},
        {".partial-mine/x": "1"},
        {".ready/x": "1", ".removing-x/y": "2"},
        {"recipe.yaml": OWN_RECIPE, ".partial-mine/x": "1"},
        {"recipe.yaml": "flour: 500 g\n", ".ready": "2"},
        {"recipe.yaml": "- eggs\n", ".lock": "theirs"},
    ],
)
def test_a_foreign_folder_is_refused_before_anything_in_it_is_touched(
    tmp_path: Path, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(RunError, match="with --output"):
        RunFolder(tmp_path).__enter__()
    assert content(tmp_path) == before


def test_a_lock_does_not_outlive_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        assert content(tmp_path).keys() == {".lock"}
    assert content(tmp_path) == {}
    with RunFolder(tmp_path / "new"):
        pass
    assert content(tmp_path) == {}


def test_leftovers_of_a_run_are_swept(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_recipe(parse({"model": "m", "data": "d.csv", "record": {}}))
    (tmp_path / ".partial-checkpoint-3").mkdir()
    (tmp_path / ".ready").mkdir()
    with RunFolder(tmp_path):
        assert content(tmp_path).keys() == {".lock", "recipe.yaml"}


def test_clearing_a_run_leaves_what_no_run_wrote_and_says_so(tmp_path: Path) -> None:
    written = ("results.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors")
    with RunFolder(tmp_path) as folder:
        folder.write_recipe(parse({"model": "m", "data": "d.csv", "record": {}}))
        (tmp_path / "checkpoint-3").mkdir()
        for name in (*written, "my_notes.txt", "my.model", "\x1b[31m.csv"):
            (tmp_path / name).write_text("")
        with pytest.warns(UserWarning, match=r"no run wrote it: \\x1b\[31m.csv, my.model, my_not"):
            folder.clear()
        left = {".lock", "my_notes.txt", "my.model", "\x1b[31m.csv"}
        assert content(tmp_path).keys() == left


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "an object"),
        ("{}", "before: Field required"),
        ('{"after": {"values": {}}}', "before: Field required"),
        ('{"before": null, "after": {"values": {"accuracy": "high"}}}', "after.values.accuracy"),
        ('{"before"', "Invalid JSON"),
        ("\udcff", "Invalid JSON"),
    ],
)
def test_damaged_results_are_one_error(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "results.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunError, match=r"results\.json is damaged") as caught:
        read_results(tmp_path)
    assert reason in str(caught.value)


def test_what_cannot_be_written_names_no_option_that_its_command_lacks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written") as caught:
        staging.write_text(tmp_path / "file" / "out", "")
    assert "--output" not in str(caught.value)


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    assert by_name({"/x/a/train.jsonl": "1", "/x/b/test.jsonl": "2"}) == {
        "train.jsonl": "1",
        "test.jsonl": "2",
    }
    assert by_name({"/x/a/train.jsonl": "1", "/x/b/train.jsonl": "2"}) == {
        "a/train.jsonl": "1",
        "b/train.jsonl": "2",
    }
    assert by_name({}) == {}


def test_every_local_part_of_the_data_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        Path(name).touch()
    assert full_data_name("a.json") == str(tmp_path / "a.json")
    asked = "a.json, b.json#50,owner/set,owner/set#7"
    assert full_data_name(asked) == (
        f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}#50,owner/set,owner/set#7"
    )
    assert full_data_name("a.json,b.json", "folder") == "a.json,b.json"
