"""Names from a file or the file system are shown escaped, and MLX's files by their name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_folders import CONFIG, STATE, P, folder_of, pair
from safetensors.torch import save_file

from deltaw.errors import DeltawError, FormatError
from deltaw.formats import loralib, peft, sniff
from deltaw.formats._files import replace_files

EVIL = "a\x1b[31m\nFix: obey\u202e"
Case = Callable[[Path], object]


def with_config(settings: dict[str, object] | bytes, misfits: list[str] | None = None) -> Case:
    def read(folder: Path) -> None:
        if not isinstance(settings, bytes):
            folder_of(folder, {**CONFIG, **settings}, pair("h.q"))
        else:
            folder_of(folder, settings, pair("h.q"))
        peft.read(folder, lambda _: misfits or [])

    return read


def with_tensors(name: str, content: bytes | dict[str, object]) -> Case:
    def read(folder: Path) -> None:
        folder_of(folder, CONFIG, pair("h.q"))
        (folder / "adapter_model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif name.endswith(".bin"):
            torch.save(content, folder / name)
        else:
            save_file(content, folder / name)
        peft.read(folder)

    return read


def with_side(folder: Path) -> None:
    folder_of(folder, CONFIG, pair("h.q"))
    (folder / "deltaw.json").write_text(json.dumps({"layers": {EVIL: 1}}))
    peft.read(folder)


def without_tensors(folder: Path) -> None:
    folder_of(folder, CONFIG, pair("h.q"))
    (folder / "adapter_model.safetensors").unlink()
    peft.read(folder)


def several_below(folder: Path) -> None:
    folder.mkdir()
    folder_of(folder / EVIL, CONFIG, pair("h.q"))
    sniff(folder)


def no_format(folder: Path) -> None:
    folder.mkdir()
    sniff(folder)


def write_to_a_file(folder: Path) -> None:
    folder.write_text("mine")
    peft.write(STATE, folder)


def without_settings(folder: Path) -> None:
    file = folder.with_name(EVIL + ".safetensors")
    save_file({f"{EVIL}.lora_A": torch.ones(2, 3)}, file)
    loralib.read(file)


CASES: dict[str, Case] = {
    "nothing there": sniff,
    "several below": several_below,
    "no format": no_format,
    "no folder": peft.read,
    "no tensors": without_tensors,
    "not JSON": with_config(b"{"),
    "not UTF-8": with_config(b"\xff"),
    "no object": with_config(b"[]"),
    "large number": with_config(b'{"r": ' + b"9" * 5000 + b"}"),
    "other type": with_config({"peft_type": EVIL}),
    "no type": with_config({"peft_type": None}),
    "MLX": with_config({"peft_type": None, "lora_parameters": {}}),
    "feature": with_config({"use_dora": EVIL}),
    "out of range": with_config({"task_type": EVIL}),
    "unknown setting": with_config({EVIL: 1}),
    "pattern": with_config({"alpha_pattern": {EVIL + "(": 2}}),
    "base": with_config({"base_model_name_or_path": EVIL}, ["it does not fit"]),
    "damaged": with_tensors("adapter_model.safetensors", b"junk" * 9),
    "pickle": with_tensors("adapter_model.bin", b"c" + EVIL.encode() + b"\n."),
    "not tensors": with_tensors("adapter_model.bin", {EVIL: 1}),
    "not finite": with_tensors(
        "adapter_model.safetensors",
        {name: tensor * float("nan") for name, tensor in pair("h.q").items()},
    ),
    "unexpected": with_tensors(
        "adapter_model.safetensors", {P + EVIL + ".lora_A.x": torch.ones(1)}
    ),
    "our own file": with_side,
    "written": write_to_a_file,
    "no file of loralib's": loralib.read,
    "loralib's": without_settings,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_name_from_outside_is_shown_raw(case: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings(), pytest.raises((DeltawError, UserWarning)) as error:
        warnings.simplefilter("error")
        case(tmp_path / EVIL)
    message = str(error.value)
    assert "\\x1b[31m\\n" in message
    assert "\nFix: obey" not in message
    assert message.replace("\n", "").isprintable()


def test_a_lone_file_of_mlx_is_refused_as_its_folder_is(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_"
    file = tmp_path / "adapters.safetensors"
    save_file({name + "a": torch.ones(5, 2), name + "b": torch.ones(2, 7)}, file)
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    messages = []
    for path in (file, tmp_path):
        with pytest.raises(FormatError, match="of MLX's adapter format") as error:
            sniff(path).read(path)
        messages.append(str(error.value).partition(" ")[2])
    assert messages[0] == messages[1]


def test_an_error_says_what_is_new_when_a_rename_fails_midway(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(DeltawError, match=r"cannot be written: .*\. Of it a is new\.\nFix"):
        replace_files(tmp_path, {"a": b"new", "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(DeltawError, match=r"What was there is intact\.\nFix"):
        replace_files(tmp_path, {"b": b"new", "a": b"newer"})
    assert (tmp_path / "a").read_bytes() == b"new"
