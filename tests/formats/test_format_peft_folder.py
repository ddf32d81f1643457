"""Files that are missing, our own file beside PEFT's, and writing that fails."""

import json
from pathlib import Path

import pytest
from adapter_states import layer, same_layers
from peft_folders import CONFIG, STATE, folder_of, pair, refusal

from deltaw.errors import DeltawError, FormatError
from deltaw.formats import Format, loralib, peft, sniff
from deltaw.state import State

NO_PATHS = ["a" * 5000, "a\0b", "b/" * 3000]


def test_missing_files_are_named_with_their_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", CONFIG, pair("h.q"))
    (folder / "adapter_model.safetensors").unlink()
    message = refusal(folder)
    assert "has no adapter_model.safetensors or adapter_model.bin" in message
    (folder / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refusal(folder)
    assert "There is no folder" in refusal(tmp_path / "gone")


def test_adapters_below_the_folder_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "default", CONFIG, pair("h.q"))
    folder_of(tmp_path / "other", CONFIG, pair("h.q"))
    assert "name one of the adapters below it: 'default', 'other'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"base": 5},
        {"layers": []},
        {"layers": {"h.q": 1}},
        {"layers": {"h.q": {"enabled": [1]}}},
        {"layers": {"h.q": {"conv1d": 1}}},
        {"layers": {"h.q": {"scale": "2"}}},
        {"layers": {"h.q": {"stacks": {"w": 2}}}},
        {"layers": {"h.q": {"stacks": [["w", -1]]}}},
        {"layers": {"h.q": {"stacks": [["w"]]}}},
        {"layers": {"h.q": {"new": 1}}},
    ],
)
def test_our_own_file_is_checked_too(content: dict[str, object], tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG, pair("h.q"))
    (tmp_path / "deltaw.json").write_text(json.dumps(content))
    assert "Fix: remove the file; the adapter does the same without it." in refusal(tmp_path)


@pytest.mark.parametrize(
    "note",
    [
        {"scale": 3.0},
        {"stacks": [["w", 2]]},
        {"stacks": [["w", 0], ["v", 0]]},
        {"enabled": [True, True]},
        {"enabled": [False, False]},
        {"enabled": [True] * 7},
        {"enabled": [True, False, False, False, False, False, False]},
    ],
)
def test_notes_of_our_own_that_the_tensors_contradict_do_nothing(
    note: dict[str, object], tmp_path: Path
) -> None:
    plain = peft.read(folder_of(tmp_path, CONFIG, pair("h.q")))
    (tmp_path / "deltaw.json").write_text(json.dumps({"layers": {"h.q": note, "gone": note}}))
    assert same_layers(peft.read(tmp_path), plain)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("full_at", [1, 2, 3])
def test_a_full_disk_leaves_the_old_files_and_no_debris(
    full_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.write(STATE, tmp_path / "old")
    before = snapshot(tmp_path)
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if len(calls) == full_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    other = State(STATE.config, {"h.k": layer("linear", scale=2.0, seed=9)})
    for folder in ("old", "new/deep"):
        calls.clear()
        with pytest.raises(
            DeltawError, match="No space left on device\\. What was there is intact"
        ):
            peft.write(other, tmp_path / folder)
        assert snapshot(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_an_interrupt_leaves_the_old_files_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.write(STATE, tmp_path)
    before = snapshot(tmp_path)

    def fsync(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        peft.write(State(STATE.config, {"h.k": layer("linear")}), tmp_path)
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeltawError, match="file cannot be written"):
        peft.write(STATE, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_again_replaces_the_adapter(tmp_path: Path) -> None:
    peft.write(STATE, tmp_path)
    other = State(STATE.config, {"h.k": layer("linear", scale=2.0, seed=9)})
    peft.write(other, tmp_path)
    assert same_layers(peft.read(tmp_path), other)


@pytest.mark.parametrize("format", [peft, loralib])
@pytest.mark.parametrize("name", NO_PATHS, ids=["long", "null", "deep"])
def test_names_that_no_file_can_have_are_refused(name: str, format: Format, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(DeltawError, match=r"cannot be written: .*What was there is intact"):
        format.write(STATE, path)
    with pytest.raises(FormatError, match=r"There is no (folder|file) "):
        format.read(path)
    with pytest.raises(FormatError, match="There is no adapter at "):
        sniff(path)
    assert not format.sniff(path)
    assert not list(tmp_path.iterdir())
