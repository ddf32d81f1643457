"""`--to mlx`: y = x Wᵀ + scale (x a) b, in the blocks and under the names that mlx-lm looks for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_models import logits, save_adapter, save_base, with_peft
from safetensors.torch import load_file
from torch import Tensor, nn

from deltaw.errors import FormatError
from deltaw.export import export


def as_mlx(base: Path, folder: Path) -> tuple[Tensor, int]:
    """The logits by mlx-lm's formula, and how many layers it would adapt."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["fine_tune_type"] == "lora" and settings["num_layers"] > 0
    wanted = settings["lora_parameters"]
    tensors = load_file(folder / "adapters.safetensors")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    blocks = range(len(model.model.layers))[-settings["num_layers"] :]
    paths = [f"model.layers.{n}.{key}" for n in blocks for key in wanted["keys"]]
    paths += [key for key in wanted["keys"] if key == "lm_head"]
    used = set()

    def adapt(path: str) -> None:
        a, b = (tensors[f"{path}.lora_{x}"] for x in "ab")
        used.update({f"{path}.lora_a", f"{path}.lora_b"})
        layer = model.get_submodule(path)
        assert a.shape == (layer.in_features, wanted["rank"])
        assert b.shape == (wanted["rank"], layer.out_features)

        def forward(x: Tensor) -> Tensor:
            return nn.Linear.forward(layer, x) + wanted["scale"] * (x @ a) @ b

        layer.forward = forward

    for path in paths:
        if f"{path}.lora_a" in tensors:
            adapt(path)
    assert used == set(tensors)
    return logits(model), len(used) // 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "lm_head"]},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"2.mlp.up_proj": 0.25}},
        {"layers_to_transform": [2], "target_modules": ["o_proj"]},
        {"layers_to_transform": [0, 2], "target_modules": ["down_proj"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_the_formula_gives_the_adapters_answers(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, **settings)
    export(source, tmp_path / "out", to="mlx", base=str(base))
    answer, count = as_mlx(base, tmp_path / "out")
    torch.testing.assert_close(answer, logits(with_peft(base, source)), rtol=1e-4, atol=1e-4)
    tensors = load_file(source / "adapter_model.safetensors")
    assert count == len(tensors) // 2


def test_the_settings_are_those_of_the_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(
        tmp_path / "run",
        base,
        layers_to_transform=[1, 2],
        lora_dropout=0.05,
        target_modules=["q_proj", "up_proj"],
    )
    told = export(source, tmp_path / "my out", to="mlx", base=str(base))
    assert json.loads((tmp_path / "my out" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 3,
            "scale": 1.0,
            "dropout": 0.05,
            "keys": ["mlp.up_proj", "self_attn.q_proj"],
        },
    }
    assert f"--adapter-path '{tmp_path / 'my out'}'" in told["next"]


@pytest.mark.parametrize(
    ("kind", "tied", "settings", "reason"),
    [
        ("gpt2", True, {"target_modules": ["c_attn"]}, "kind conv1d"),
        (
            "gpt2",
            True,
            {"target_modules": ["c_attn"]},
            "transformer.h.0.attn.c_attn: mlx-lm has no",
        ),
        ("llama", True, {"target_modules": ["lm_head"]}, "lm_head: mlx-lm has no module"),
        ("llama", False, {"target_modules": ["embed_tokens"]}, "kind embedding"),
        (
            "llama",
            False,
            {"modules_to_save": ["norm"]},
            "model.norm: its weight was trained in full",
        ),
        ("llama", False, {"use_dora": True}, "the magnitudes of DoRA"),
        ("llama", False, {"lora_bias": True}, "a bias on B"),
    ],
)
def test_what_mlx_cannot_hold_is_refused(tmp_path: Path, kind, tied, settings, reason) -> None:
    base = save_base(tmp_path / "base", kind, tie_word_embeddings=tied)
    source = save_adapter(tmp_path / "run", base, **settings)
    with pytest.raises(FormatError, match=reason) as error:
        export(source, tmp_path / "out", to="mlx", base=str(base))
    assert "--to hf" in str(error.value) and not (tmp_path / "out").exists()
