"""`--to gguf`: names, shapes and rows are those that llama.cpp looks for in its own base."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import save_adapter, save_base
from safetensors.torch import load_file
from torch import Tensor

from deltaw.errors import ConfigError, FormatError
from deltaw.export import export
from deltaw.export.gguf import interleaved

reading = pytest.importorskip("gguf")

LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
HEADS = {"q_proj": 4, "k_proj": 2}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of a GGUF file, and its tensors in the order of numpy's axes."""
    reader = reading.GGUFReader(file)
    settings = {key: field.contents() for key, field in reader.fields.items()}
    return settings, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def permuted(matrix: Tensor, heads: int) -> Tensor:
    """Rows i and i + d/2 of every head of width d made neighbours, one by one."""
    width = len(matrix) // heads
    rows = []
    for head in range(heads):
        for i in range(width // 2):
            rows += [head * width + i, head * width + i + width // 2]
    return matrix[rows]


@pytest.mark.parametrize(
    ("kind", "architecture", "names"),
    [
        ("llama", "llama", LLAMA),
        ("mistral", "llama", LLAMA),
        ("qwen2", "qwen2", LLAMA),
        ("qwen3", "qwen3", LLAMA),
        ("gpt2", "gpt2", GPT2),
    ],
)
def test_the_file_holds_delta_in_llama_cpps_layout(tmp_path, kind, architecture, names) -> None:
    base = save_base(tmp_path / "base", kind)
    first = next(iter(names))
    source = save_adapter(
        tmp_path / "run",
        base,
        target_modules=list(names),
        rank_pattern={"1." + first: 5},
        alpha_pattern={"2." + first: 0.5},
    )
    told = export(source, tmp_path / "out", to="gguf", base=str(base))
    settings, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert settings["general.type"] == "adapter"
    assert settings["general.architecture"] == architecture
    assert settings["adapter.type"] == "lora"
    stem = "transformer.h" if kind == "gpt2" else "model.layers"
    given = load_file(source / "adapter_model.safetensors")
    expected = set()
    for block in range(3):
        for name, short in names.items():
            A, B = (
                given[f"base_model.model.{stem}.{block}.{name}.lora_{x}.weight"].double()
                for x in "AB"
            )
            alpha = 0.5 if (block, name) == (2, first) else 7
            delta = alpha / len(A) * B @ A
            heads = HEADS.get(name.rpartition(".")[2])
            if heads and architecture == "llama":
                delta = permuted(delta, heads)
            a, b = (tensors[f"blk.{block}.{short}.weight.lora_{x}"].double() for x in "ab")
            expected |= {f"blk.{block}.{short}.weight.lora_{x}" for x in "ab"}
            assert a.shape[1] == delta.shape[1] and b.shape == (delta.shape[0], len(a))
            scale = settings["adapter.lora.alpha"] / len(a)
            torch.testing.assert_close(scale * b @ a, delta, rtol=1e-5, atol=1e-6)
    assert set(tensors) == expected
    assert str(tmp_path / "out" / "adapter.gguf") in told["next"]


def test_an_untied_head_is_the_output(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, target_modules=["lm_head"])
    export(source, tmp_path / "out", to="gguf", base=str(base))
    _, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert set(tensors) == {"output.weight.lora_a", "output.weight.lora_b"}


@pytest.mark.parametrize(("rows", "heads"), [(24, 4), (16, 2), (6, 1), (10, 5)])
def test_the_order_of_rows_turns_one_rotary_embedding_into_the_other(rows, heads) -> None:
    width = rows // heads
    angle = torch.rand(width // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    x = torch.randn(heads, width, dtype=torch.float64)
    low, high = x[:, : width // 2], x[:, width // 2 :]
    halves = torch.cat([low * cos - high * sin, high * cos + low * sin], 1).flatten()
    order = interleaved(rows, heads)
    y = x.flatten()[order].view(heads, width // 2, 2)
    even, odd = y[..., 0], y[..., 1]
    neighbours = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten()
    torch.testing.assert_close(neighbours, halves[order])
    matrix = torch.randn(rows, 3)
    assert torch.equal(matrix[order], permuted(matrix, heads))


@pytest.mark.parametrize(
    ("kind", "tied", "settings", "reason"),
    [
        ("llama", True, {"target_modules": ["lm_head"]}, "lm_head: it is tied to the embedding"),
        ("llama", False, {"target_modules": ["embed_tokens"]}, "kind embedding"),
        ("llama", False, {"modules_to_save": ["norm"]}, "model.norm: its weight was trained"),
        ("llama", False, {"use_dora": True}, "the magnitudes of DoRA"),
        ("gpt2", True, {"target_modules": ["c_attn"], "bias": "lora_only"}, "its bias was trained"),
        ("gemma", False, {}, "of type gemma is not written as GGUF; gpt2, llama, mistral, qwen2"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(tmp_path: Path, kind, tied, settings, reason) -> None:
    base = save_base(tmp_path / "base", kind, tie_word_embeddings=tied)
    source = save_adapter(tmp_path / "run", base, **settings)
    with pytest.raises(FormatError, match=reason) as error:
        export(source, tmp_path / "out", to="gguf", base=str(base))
    assert "--to hf" in str(error.value) and not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'deltaw\[gguf\]'"):
        export(source, tmp_path / "out", to="gguf", base=str(base))
