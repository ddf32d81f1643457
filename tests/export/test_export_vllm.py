"""`--to vllm`: what its loader reads gives the adapter's answers, by its own rules."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from language_models import logits, save_adapter, save_base, tokenizer, with_peft
from safetensors.torch import load_file

from deltaw.errors import FormatError
from deltaw.export import export

PREFIX = "base_model.model."
LORA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def as_vllm(base: Path, folder: Path, most: int) -> torch.Tensor:
    """The logits of the base with what vLLM's loader takes from `folder`: one r, one alpha."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(settings["target_modules"], (list, str))
    assert settings["r"] <= most
    assert not settings["modules_to_save"] and not settings["use_dora"]
    assert settings["bias"] == "none"
    scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, A in tensors.items():
            name, _, part = key.removeprefix(PREFIX).partition(".lora_")
            assert key.startswith(PREFIX) and part in ("A.weight", "B.weight"), key
            assert name.rsplit(".", 1)[-1] in LORA_MODULES
            if part == "A.weight":
                assert A.shape[0] == settings["r"]
                B = tensors[key.replace("lora_A", "lora_B")]
                model.get_submodule(name).weight += scale * B @ A
    return logits(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_and_ranks_are_folded(tmp_path: Path, rslora: bool) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(
        tmp_path / "run",
        base,
        use_rslora=rslora,
        rank_pattern={"q_proj": 9, "layers.0.mlp.up_proj": 1},
        alpha_pattern={"down_proj": 0.5, "v_proj": 11},
    )
    told = export(source, tmp_path / "out", to="vllm", base=str(base))
    wanted = logits(with_peft(base, source))
    torch.testing.assert_close(as_vllm(base, tmp_path / "out", 16), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(with_peft(base, tmp_path / "out")), wanted, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(AssertionError):  # what was exported needs to be
        torch.testing.assert_close(as_vllm(base, source, 16), wanted, rtol=1e-4, atol=1e-4)
    assert "r=9" in told["written"]


def test_a_start_that_is_subtracted_counts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, init_lora_weights="olora")
    export(source, tmp_path / "out", to="vllm", base=str(base))
    wanted = logits(with_peft(base, source))
    torch.testing.assert_close(as_vllm(base, tmp_path / "out", 8), wanted, rtol=1e-4, atol=1e-4)


def test_the_rank_that_counts_is_the_one_that_is_written(tmp_path: Path, monkeypatch) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, r=5, init_lora_weights="olora")
    monkeypatch.setattr("deltaw.export.vllm.RANKS", (8,))
    with pytest.raises(FormatError, match=r"model\.layers\.0\..*: its rank is 10, above 8"):
        export(source, tmp_path / "out", to="vllm", base=str(base))


@pytest.mark.parametrize(
    ("r", "most"), [(1, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)]
)
def test_the_line_to_serve_it_can_be_typed(tmp_path: Path, r: int, most: int) -> None:
    base = save_base(tmp_path / "a base's")
    source = save_adapter(tmp_path / "run", base, r=r, target_modules=["layers.0.mlp.up_proj"])
    out = tmp_path / "o u't"
    line = shlex.split(export(source, out, to="vllm", base=str(base))["next"])
    assert line == [
        *["vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", str(most)],
        *["--lora-modules", f"o u't={out}"],
    ]


def test_a_place_with_an_equals_sign_a_revision_and_a_template(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = {"base_model_name_or_path": "nobody/model", "revision": "v2"}
    source = save_adapter(tmp_path / "run", base, **settings)
    tokenizer("{{ messages[0].content }}").save_pretrained(source)
    out = tmp_path / "r=3,x"
    line = shlex.split(export(source, out, to="vllm")["next"])
    assert json.loads(line[-1]) == {"name": "r=3,x", "path": str(out)}
    assert line[line.index("--revision") + 1] == "v2"
    assert Path(line[line.index("--chat-template") + 1]).is_file()


def test_all_that_vllm_refuses_is_in_one_error(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", mlp_bias=True)
    source = save_adapter(
        tmp_path / "run",
        base,
        target_modules=["q_proj", "embed_tokens", "up_proj"],
        modules_to_save=["norm"],
        bias="lora_only",
        rank_pattern={"0.self_attn.q_proj": 513},
    )
    with pytest.raises(FormatError) as error:
        export(source, tmp_path / "out", to="vllm", base=str(base))
    text = str(error.value)
    for reason in (
        "model.norm: its weight was trained in full",
        "model.layers.2.mlp.up_proj: its bias was trained in full",
        "model.embed_tokens: an adapter on a layer of kind embedding",
        "model.layers.0.self_attn.q_proj: its rank is 513, above 512",
    ):
        assert f"  - {reason}\n" in text
    assert text.endswith(f"deltaw export {source} NEW_FOLDER --to hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_bias": True}, "model.layers.1.self_attn.q_proj: a bias on B"),
        ({"use_dora": True}, "the magnitudes of DoRA"),
        ({"trainable_token_indices": [3, 5]}, "rows of single tokens that were trained"),
    ],
)
def test_other_parts_of_an_adapter_are_refused(tmp_path: Path, settings, reason) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, **settings)
    with pytest.raises(FormatError, match=reason):
        export(source, tmp_path / "out", to="vllm", base=str(base))


def test_a_classifier_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"not for a language model\n  - classifier: its bias"):
        export(finished, tmp_path / "out", to="vllm")
