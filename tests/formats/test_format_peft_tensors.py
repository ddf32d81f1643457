"""Tensor files that are damaged, hostile, or do not fit together."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from adapter_states import same_layers
from peft_folders import CONFIG, STATE, P, folder_of, pair, refusal

from deltaw.errors import FormatError
from deltaw.formats import peft


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
        P + "ok.base_layer.inner.lora_A.weight": torch.ones(3, 5),
        P + "ok.base_layer.inner.lora_B.weight": torch.ones(7, 3),
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
        "'dora': lora_A is missing beside 'base_model.model.dora.lora_magnitude_vector'",
        "'emb': the file has rows (1, 7) in torch.float32, and trainable_token_indices has 0",
        "KaSA is not supported",
        "'ok.base_layer.inner': an adapter inside the adapted 'ok'",
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
        safetensors(entry([0, 2**63], 0)),
        safetensors(entry([0, 2**40, 2**40], 0)),
        safetensors(entry([0, 2**63 - 1, 4], 0)),
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


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, 5).to_sparse(), "is torch.sparse_coo"),
        (torch.empty(3, 5, device="meta"), "is on the meta device and has no numbers"),
        (torch.ones(3, 5).to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
        (torch.ones(1).expand(3, 10**14), "of (3, 100000000000000) repeats what is stored"),
    ],
)
def test_a_pickle_of_tensors_that_are_not_plain_is_refused(
    value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    tensors = pair("h.q") | {P + "h.q.lora_A.weight": value, P + "h.v.lora_A.weight": value}
    torch.save(tensors, tmp_path / "x")
    refused = refusal(with_pickle(tmp_path, (tmp_path / "x").read_bytes()))
    for path in ("h.q", "h.v"):
        assert f"'base_model.model.{path}.lora_A.weight' {message}" in refused
    assert "Fix: save the adapter's state dict alone, as plain dense tensors" in refused


def test_a_pickle_of_a_nested_tensor_is_refused(tmp_path: Path) -> None:
    rows = [torch.ones(5), torch.ones(4)]
    torch.save({"a": torch.nested.nested_tensor(rows, layout=torch.jagged)}, tmp_path / "x")
    assert "'a' is nested" in refusal(with_pickle(tmp_path, (tmp_path / "x").read_bytes()))
