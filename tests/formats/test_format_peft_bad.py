"""Folders of PEFT's that are damaged, hostile, or ask for what deltaw cannot do."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from adapter_states import layer, same_layers
from safetensors.torch import save_file

from deltaw.config import LoraConfig
from deltaw.errors import DeltawError, FormatError
from deltaw.formats import peft
from deltaw.state import State

P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q"]}
STATE = State(LoraConfig(r=3, lora_alpha=6), {"h.q": layer("linear", scale=2.0)})


def pair(path: str, r: int = 3) -> dict[str, torch.Tensor]:
    return {
        f"{P}{path}.lora_A.weight": torch.randn(r, 5),
        f"{P}{path}.lora_B.weight": torch.randn(7, r),
    }


def folder_of(
    folder: Path, config: dict[str, object] | bytes, tensors: dict[str, torch.Tensor] | bytes
) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    file = folder / "adapter_model.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as error:
        peft.read(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- what is accepted


def test_absent_settings_are_those_of_peft(tmp_path: Path) -> None:
    state = peft.read(folder_of(tmp_path, {"peft_type": "LORA"}, pair("h.q", 8)))
    assert (state.config.r, state.config.lora_alpha) == (8, 8)
    assert state.layers["h.q"].scale == 1.0
    assert state.config.target_modules == ["h.q"]
    assert state.config.modules_to_save == [] and state.base is None


def test_settings_of_every_version_are_accepted_at_neutral_values(tmp_path: Path) -> None:
    neutral: dict[str, object] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "auto_mapping": {"base_model_class": "X"},
        "corda_config": None,
        "enable_lora": None,
        "ensure_weight_tying": False,
        "eva_config": {"rho": 2.0},
        "exclude_modules": None,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": "",
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "merge_weights": False,
        "monteclora_config": None,
        "peft_version": "0.18.2",
        "qalora_group_size": 16,
        "rank_pattern": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    }
    assert peft.read(folder_of(tmp_path, CONFIG | neutral, pair("h.q"))).layers.keys() == {"h.q"}


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_the_start_is_never_repeated(start: object, tmp_path: Path) -> None:
    state = peft.read(folder_of(tmp_path, CONFIG | {"init_lora_weights": start}, pair("h.q")))
    assert state.config.init_lora_weights is True


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_that_changed_the_base_is_warned_of(start: str, tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG | {"init_lora_weights": start}, pair("h.q"))
    with pytest.warns(UserWarning, match=f"'{start}', a start that changes the base"):
        assert peft.read(tmp_path).config.init_lora_weights is True


def test_settings_never_seen_before_are_named_in_a_warning(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG | {"use_magic": True, "a_new_one": None}, pair("h.q"))
    with pytest.warns(UserWarning, match="'a_new_one', 'use_magic'"):
        peft.read(tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()
    assert peft.read(folder_of(tmp_path, text, pair("h.q"))).layers.keys() == {"h.q"}


def test_a_legacy_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    tensors = pair("h.q")
    folder_of(tmp_path, CONFIG, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    a = peft.read(tmp_path)
    b = peft.read(folder_of(tmp_path / "b", CONFIG, tensors))
    assert same_layers(a, b)


def test_the_tensor_file_stands_for_its_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIG, pair("h.q"))
    file = tmp_path / "adapter_model.safetensors"
    assert peft.sniff(file) and peft.sniff(tmp_path)
    assert same_layers(peft.read(file), peft.read(tmp_path))
    assert not peft.sniff(tmp_path / "adapter_config.json")


def test_patterns_of_alpha_take_the_first_that_matches(tmp_path: Path) -> None:
    patterns = {"^h.q": 12, "q": 9, "h.q": 15}
    tensors = pair("h.q") | pair("z.h.q") | pair("xq")
    state = peft.read(folder_of(tmp_path, CONFIG | {"alpha_pattern": patterns}, tensors))
    scales = {path: at.scale for path, at in state.layers.items()}
    assert scales == {"h.q": 4.0, "z.h.q": 3.0, "xq": 2.0}


def test_patterns_that_name_no_layer_or_would_run_for_years_do_not_matter(tmp_path: Path) -> None:
    config = CONFIG | {"target_modules": "(a+)+$", "rank_pattern": {"(a+)+$": 3, "gone": 3}}
    state = peft.read(folder_of(tmp_path, config, pair("h." + "a" * 40 + "!")))
    assert len(state.layers) == 1


def test_biases_inside_the_wrappers_of_peft_are_not_taken_for_the_models(tmp_path: Path) -> None:
    tensors = pair("h.q") | {
        P + "h.q.base_layer.bias": torch.ones(7),
        P + "head.bias": torch.ones(2),
        P + "head.weight": torch.ones(2, 7),
        P + "head.original_module.bias": torch.zeros(2),
        P + "head.modules_to_save.bias": torch.ones(2),
    }
    state = peft.read(folder_of(tmp_path, CONFIG | {"bias": "all"}, tensors))
    assert state.layers.keys() == {"h.q", "head"}
    assert state.layers["h.q"].tensors.keys() == {
        "weight.lora_A",
        "weight.lora_B",
        "bias.trained",
    }
    assert state.layers["head"].tensors.keys() == {"weight.trained", "bias.trained"}


def test_the_frozen_weight_beside_an_adapted_embedding_is_named_and_left(tmp_path: Path) -> None:
    tensors = {
        P + "wte.lora_embedding_A": torch.randn(3, 5),
        P + "wte.lora_embedding_B": torch.randn(7, 3),
        P + "wte.base_layer.weight": torch.randn(5, 7),
        P + "head.base_layer.weight": torch.randn(5, 7),
    }
    with pytest.warns(UserWarning, match=r"wte\.base_layer\.weight'.* not read") as seen:
        state = peft.read(folder_of(tmp_path, CONFIG, tensors))
    assert len(seen) == 1
    assert state.layers["wte"].tensors.keys() == {"weight.lora_A", "weight.lora_B"}
    assert state.layers["head.base_layer"].tensors.keys() == {"weight.trained"}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("key", "value", "feature"),
    [
        ("use_dora", True, "DoRA"),
        ("use_qalora", True, "QA-LoRA"),
        ("target_parameters", ["w"], "stacked experts"),
        ("trainable_token_indices", [1], "trainable tokens"),
        ("layer_replication", [[0, 1]], "layer replication"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("velora_config", {"scale": 1}, "VeLoRA"),
        ("monteclora_config", {"a": 1}, "MonteCLoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("ensure_weight_tying", True, "tied"),
        ("enable_lora", [True, False], "fused"),
    ],
)
def test_features_that_are_missing_are_named(
    key: str, value: object, feature: str, tmp_path: Path
) -> None:
    message = refusal(folder_of(tmp_path, CONFIG | {key: value}, pair("h.q")))
    assert key in message and feature in message and "adapter_config.json" in message


def test_all_wrong_settings_are_listed_at_once(tmp_path: Path) -> None:
    wrong = {
        "r": "8",
        "lora_alpha": True,
        "target_modules": [1],
        "alpha_pattern": {"q": "x"},
        "rank_pattern": [1],
        "bias": None,
        "lora_dropout": 10**400,
        "use_dora": True,
    }
    message = refusal(folder_of(tmp_path, CONFIG | wrong, pair("h.q")))
    assert message.count("\n  - ") == len(wrong)
    for key in wrong:
        assert key in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0"),
        ({"lora_alpha": -1}, "lora_alpha must be a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie in [0, 1)"),
        ({"bias": "some"}, "bias must be one of"),
    ],
)
def test_settings_out_of_range_name_the_file(
    setting: dict[str, object], message: str, tmp_path: Path
) -> None:
    assert message in refusal(folder_of(tmp_path, CONFIG | setting, pair("h.q")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"peft_type": "LORA",\n "r": }', "adapter_config.json:2: not JSON"),
        (b'{"peft_type": "LORA",\n "r": "\xff"}', "adapter_config.json:2: not UTF-8: byte 0xff"),
        (b"", "adapter_config.json:1: not JSON"),
        (b"[1]", "adapter_config.json:1: expected a JSON object, found list"),
        (b"[" * 100_000, "not a JSON file of settings"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not a JSON file of settings"),
        (b"{}", "has no peft_type"),
        (b'{"peft_type": "IA3"}', "peft_type is 'IA3'; only 'LORA' is read"),
        (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
        (b'{"fine_tune_type": "lora"}', "MLX's adapter format"),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_its_line(
    text: bytes, message: str, tmp_path: Path
) -> None:
    assert message in refusal(folder_of(tmp_path, text, pair("h.q")))


@pytest.mark.parametrize("pattern", ["(a+)+b", "[", "[ab]" * 300])
def test_a_pattern_of_alpha_that_cannot_be_used_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaw.patterns.SECONDS", 0.5)
    config = CONFIG | {"alpha_pattern": {pattern: 9}}
    message = refusal(folder_of(tmp_path, config, pair("h." + "a" * 60)))
    assert "alpha_pattern" in message


# ---------------------------------------------------------------- tensors


def test_all_that_is_wrong_with_the_tensors_is_listed_at_once(tmp_path: Path) -> None:
    tensors = {
        **pair("ok"),
        P + "alone.lora_A.weight": torch.ones(3, 5),
        P + "other.lora_embedding_B": torch.ones(7, 3),
        "model.h.q.lora_A.weight": torch.ones(3, 5),
        P + "h.q.lora_A.default.weight": torch.ones(3, 5),
        P + "rank.lora_A.weight": torch.ones(3, 5),
        P + "rank.lora_B.weight": torch.ones(7, 2),
        P + "conv.lora_A.weight": torch.ones(3, 2, 3, 3),
        P + "conv.lora_B.weight": torch.ones(5, 3, 3, 3),
        P + "bias.lora_A.weight": torch.ones(3, 5),
        P + "bias.lora_B.weight": torch.ones(7, 3),
        P + "bias.lora_B.bias": torch.ones(6),
        P + "whole.lora_A.weight": torch.ones(3, 5, dtype=torch.int8),
        P + "whole.lora_B.weight": torch.ones(7, 3),
        P + "dora.lora_magnitude_vector": torch.ones(7),
        P + "emb.token_adapter.trainable_tokens_delta": torch.ones(1, 7),
        P + "kasa.lora_diag": torch.ones(3),
        P + "ok.base_layer.out_proj.lora_A.weight": torch.ones(3, 5),
        P + "ok.base_layer.out_proj.lora_B.weight": torch.ones(7, 3),
        P + "large.lora_A.weight": torch.ones(4, 5),
        P + "large.lora_B.weight": torch.ones(7, 4),
    }
    message = refusal(folder_of(tmp_path, CONFIG, tensors))
    for text in (
        "'alone': lora_B is missing beside 'base_model.model.alone.lora_A.weight'",
        "'other': lora_A is missing",
        "unexpected 'model.h.q.lora_A.weight': it does not start with 'base_model.model.'",
        "unexpected 'base_model.model.h.q.lora_A.default.weight'",
        "'rank': shapes do not fit each other: lora_A (3, 5), lora_B (7, 2)",
        "'conv': shapes do not fit each other",
        "'bias': shapes do not fit each other",
        "'base_model.model.whole.lora_A.weight' holds torch.int8",
        "DoRA is not supported",
        "trainable tokens is not supported",
        "KaSA is not supported",
        "'ok.base_layer.out_proj': an adapter inside the adapted 'ok'",
        "'large': rank 4 by its shape, but the settings know only 3",
    ):
        assert text in message
    assert message.count("\n  - ") == 13


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 5), (7, 0)),
        ((3, 0), (7, 3)),
        ((3,), (7, 3)),
        ((3, 5, 1), (7, 3)),
        ((4, 2, 3, 3), (6, 3, 1, 1)),
        ((3, 2, 1, 1, 1, 1), (6, 3, 1, 1, 1, 1)),
        ((6, 4, 3, 1), (5, 3, 1, 1)),
    ],
)
def test_absurd_shapes_are_refused(shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    tensors = {
        P + "h.q.lora_A.weight": torch.ones(shapes[0]),
        P + "h.q.lora_B.weight": torch.ones(shapes[1]),
    }
    config = CONFIG | {"rank_pattern": {"a": 4, "b": 6}}
    assert "shapes do not fit each other" in refusal(folder_of(tmp_path, config, tensors))


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, object]:
    return {P + "q.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        safetensors(b"", length=2**60),
        safetensors(b"{}", length=9),
        safetensors(b"not json"),
        safetensors(b"\xff\xfe"),
        safetensors(entry([-3, 5], 60), bytes(60)),
        safetensors(entry([2**62, 2**62], 8), bytes(8)),
        safetensors(entry([2**40, 5], 60), bytes(60)),
        safetensors(entry([3, 5], 60), bytes(59)),
        safetensors(entry([3, 5], 60), bytes(61)),
        safetensors(entry([3, 5], 60, "F99"), bytes(60)),
        safetensors(entry([3, 5], 15, "F8_E4M3"), bytes(15)),
    ],
)
def test_damaged_safetensors_are_refused_before_anything_is_read(
    content: bytes, tmp_path: Path
) -> None:
    assert "adapter_model.safetensors" in refusal(folder_of(tmp_path, CONFIG, content))


def test_shapes_are_refused_before_the_numbers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, CONFIG, {P + "h.q.lora_A.weight": torch.ones(3, 5)})
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("tensors were read"))
    assert "lora_B is missing" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tensors = pair("h.q") | pair("h.v")
    tensors[P + "h.q.lora_A.weight"][0, 0] = value
    tensors[P + "h.v.lora_B.weight"][:2] = value
    message = refusal(folder_of(tmp_path, CONFIG, tensors))
    assert "'base_model.model.h.q.lora_A.weight' has 1 NaN or Inf of 15" in message
    assert "'base_model.model.h.v.lora_B.weight' has 6 NaN or Inf of 21" in message


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    peft.write(STATE, tmp_path)
    state = peft.read(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with file.open("r+b") as opened:  # as a library does that overwrites in place
        opened.seek(-100, os.SEEK_END)
        opened.write(bytes(100))
    assert same_layers(state, STATE)


def test_an_empty_file_of_tensors_is_refused(tmp_path: Path) -> None:
    assert "it holds no tensor of an adapter" in refusal(folder_of(tmp_path, CONFIG, {}))


# ---------------------------------------------------------------- pickles


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def with_pickle(folder: Path, content: bytes) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.bin").write_bytes(content)
    return folder


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    message = refusal(with_pickle(tmp_path, pickle.dumps({"a": Command(target)}, protocol=2)))
    assert "it would run code of its own when loaded, which deltaw never does" in message
    torch.save({"a": Command(target)}, tmp_path / "adapter_model.bin")
    assert "it would run code of its own" in refusal(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_pickle_is_refused(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    torch.save(pair("h.q"), file, _use_new_zipfile_serialization=seed % 2 == 0)
    content = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    if seed % 4 < 2:
        del content[draw(len(content)) :]
    else:
        for _ in range(3):
            content[draw(500)] ^= 1 + draw(255)
    try:
        peft.read(with_pickle(tmp_path, bytes(content)))
    except FormatError as error:
        assert str(tmp_path) in str(error)  # other types of error fail the test


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list, not tensors by name"),
        ({"a": 1, 2: torch.ones(1)}, "'a' is a int"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
    ],
)
def test_a_pickle_of_other_things_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x")
    assert message in refusal(with_pickle(tmp_path, (tmp_path / "x").read_bytes()))


# ---------------------------------------------------------------- folders and our own file


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


# ---------------------------------------------------------------- writing


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


# ---------------------------------------------------------------- real files


def test_real_adapters_of_other_peoples_runs_are_read(shared: Path) -> None:
    folder = shared / "adapters"
    roberta = peft.read(folder / "peft_roberta_base_mrpc_r8")
    assert len(roberta.layers) == 26 and roberta.config.task_type == "SEQ_CLS"
    assert {at.scale for at in roberta.layers.values() if at.kind == "linear"} == {2.0}
    assert roberta.layers["classifier.out_proj"].tensors["weight.trained"].shape == (2, 768)
    gpt2 = peft.read(folder / "trl_gpt2_kto_hh")
    assert {at.kind for at in gpt2.layers.values()} == {"conv1d"} and len(gpt2.layers) == 12
    opt = peft.read(folder / "peft_regression_opt350m")
    assert len(opt.layers) == 48 and opt.config.init_lora_weights is True
    with pytest.raises(FormatError, match="MLX's adapter format"):
        peft.read(folder / "mlx_qwen25_05b_dpo_2iters")


@pytest.mark.parametrize("name", ["peft_roberta_base_mrpc_r8", "trl_gpt2_kto_hh"])
def test_a_real_adapter_written_again_holds_the_same_tensors(
    name: str, shared: Path, tmp_path: Path
) -> None:
    source = shared / "adapters" / name
    state = peft.read(source)
    peft.write(state, tmp_path)
    assert same_layers(peft.read(tmp_path), state)
    written, original = (p / "adapter_model.safetensors" for p in (tmp_path, source))
    assert written.read_bytes() == original.read_bytes()
