"""Headers of local files and of the hub, models on the meta device, and every bad input."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from memory_models import llama, saved
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.analysis.memory import Training, estimate
from deltaw.analysis.memory.headers import Header, read_headers
from deltaw.errors import ConfigError, FormatError, RunError, TargetError

SMALL = Training(rows=2, tokens=8, adapter=deltaw.LoraConfig(r=2))


def test_whole_and_sharded_files_say_the_same(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    whole = read_headers(str(saved(model, tmp_path / "whole")))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20kB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert read_headers(str(tmp_path / "parts")) == whole
    assert whole.dtype == torch.bfloat16
    assert whole.nbytes == sum(p.nbytes for p in model.parameters())
    assert whole.headers["model.norm.weight"] == Header("BF16", (32,))
    assert estimate(tmp_path / "parts", SMALL) == estimate(str(tmp_path / "whole"), SMALL)


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes after the headers may be anything, and be absent from the disk."""
    folder = saved(llama(), tmp_path)
    file = folder / "model.safetensors"
    whole = estimate(folder, SMALL)
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(length)
        opened.truncate(size)
    assert estimate(folder, SMALL) == whole


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()
    names = [name for name, _ in model.named_parameters()]
    found = estimate(model, SMALL)
    assert names == [name for name, _ in model.named_parameters()]
    assert all(p.is_meta for p in model.parameters())
    assert found.parts["adapters"] == deltaw.plan(model, SMALL.adapter).parameters * 4 + 8
    assert found.parts["weights"] >= sum(p.nbytes for p in model.parameters())
    assert (
        found.parts["activations"] == estimate(saved(llama(), tmp_path), SMALL).parts["activations"]
    )


def test_a_model_with_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight does[^§]*Fix: build it"):
        estimate(llama(), SMALL)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers and the configuration are asked for."""
    folder = saved(llama(), tmp_path)
    tensors = {
        name: SimpleNamespace(dtype="F32", shape=list(tensor.shape))
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    asked: list[str] = []

    def metadata(name: str, revision: str | None) -> Any:
        asked.append(name)
        return SimpleNamespace(files_metadata={"one": SimpleNamespace(tensors=tensors)})

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **_: config)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    assert estimate("some/model", SMALL) == estimate(folder, SMALL)
    assert asked == ["some/model"]


def test_a_model_that_was_downloaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(llama(), tmp_path)
    asked: list[tuple[str, str, str | None]] = []

    def cached(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert read_headers("some/model", "v1") == read_headers(str(folder))
    assert asked == [("some/model", "model.safetensors", "v1")]


def test_the_hub_that_does_not_answer() -> None:
    with pytest.raises(RunError, match=r"headers of some/\\x1bmodel cannot be read[^§]*Fix: give"):
        read_headers("some/\x1bmodel")


def test_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise hub_errors.HTTPError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    with pytest.raises(RunError, match="no route to host"):
        read_headers("some/model")


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"method": "prefix", "rows": 0}, ["method='prefix'", "rows=0"]),
        ({"tokens": -1, "dtype": "int8", "labels": 0}, ["tokens=-1", "dtype='int8'", "labels=0"]),
        ({"layerwise": True, "galore_rank": 0}, ["layerwise=True", "galore_rank=0"]),
        ({"method": "full", "fuse_loss": True}, ["fuse_loss"]),
        ({"labels": 2, "fuse_loss": True}, ["fuse_loss"]),
    ],
)
def test_settings_that_cannot_be(settings: Any, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Training(**settings)
    assert str(caught.value).count("\n  - ") == len(problems)
    assert all(problem in str(caught.value) for problem in problems)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"neither model\.safetensors nor[^§]*Fix: give"):
        read_headers(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(FormatError, match=r"no index of weights[^§]*Fix: copy"):
            read_headers(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "../../b.safetensors"}}))
    (tmp_path / "a.safetensors").write_bytes(b"\x09")
    with pytest.raises(FormatError) as caught:
        read_headers(str(tmp_path))
    assert "a.safetensors: " in str(caught.value) and "  - b.safetensors: " in str(caught.value)
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"size is not known:\n  - C64\nFix: "):
        read_headers(str(tmp_path))


def test_a_configuration_that_does_not_fit(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": 80, "vocab_size": 90}))
    with pytest.raises(FormatError) as caught:
        estimate(folder, SMALL)
    text = str(caught.value)
    assert text.count("\n  - ") == 3 * 3 + 2
    assert "lm_head.weight: (97, 32) in the files, (90, 32) by the configuration" in text
    file.write_text(json.dumps({"model_type": "nothing\x1b"}))
    with pytest.raises(RunError, match=r"cannot be built: [^\x1b]*\nFix: "):
        estimate(folder, SMALL)


def test_adapters_that_fit_nothing(tmp_path: Path) -> None:
    adapter = deltaw.LoraConfig(target_modules=["q_prj"])
    with pytest.raises(TargetError, match="q_prj"):
        estimate(saved(llama(), tmp_path), Training(adapter=adapter))


def test_importing_needs_no_transformers() -> None:
    code = "import sys, deltaw.analysis.memory; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
