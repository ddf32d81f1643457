"""Every kind of layer through files, both ways."""

import json
from pathlib import Path

import pytest
import torch
from peft_pair import (
    IDS,
    Convolution,
    Mlp,
    ScaledEmbedding,
    Tokens,
    X,
    both_directions,
    close,
    gpt2,
    llama,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)
from torch import nn

import deltaw

P = "base_model.model."


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_12_embeddings(kind: type[nn.Embedding], tmp_path: Path) -> None:
    base = seeded(lambda: Tokens(kind))
    ids = torch.arange(22).view(2, 11) % 11
    both_directions(base, ids, tmp_path, r=3, lora_alpha=7, target_modules=["emb", "lin"])


def test_12_the_embedding_of_gemma(tmp_path: Path) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = seeded(
        lambda: Tokens(lambda n, d: Gemma3TextScaledWordEmbedding(n, d, 0, embed_scale=1.7))
    )
    # PEFT gives the padding row a delta that no training can have made; ours has none.
    ids = torch.arange(1, 11).view(2, 5)
    both_directions(base, ids, tmp_path, r=3, lora_alpha=7, target_modules=["emb"])


def test_12_an_embedding_whose_frozen_weight_peft_stores_too(tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj", "lm_head"]
    theirs = with_peft(llama(), r=3, lora_alpha=7, target_modules=targets)
    written = saved_by_peft(theirs, tmp_path / "theirs")
    assert P + "model.embed_tokens.base_layer.weight" in tensors(written)
    with pytest.warns(UserWarning, match=r"embed_tokens\.base_layer\.weight'.* not read"):
        ours = loaded_by_deltaw(llama(), written)
    ids = {"input_ids": IDS["input_ids"] + 1}  # without the padding token
    close(output(theirs, ids), output(ours, ids), 2e-6)
    again = saved_by_deltaw(ours, tmp_path / "ours")
    close(output(theirs, ids), output(loaded_by_peft(llama(), again), ids), 2e-6)


def test_13_conv1d_of_gpt2(tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc", "c_proj"]
    both_directions(
        gpt2(), IDS, tmp_path, r=3, lora_alpha=7, target_modules=targets, fan_in_fan_out=True
    )
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


@pytest.mark.parametrize("flags", [[True, False, True], [False, True, False], [True, True, True]])
@pytest.mark.parametrize("rslora", [False, True])
def test_13_slices_of_c_attn_are_read_by_peft(
    flags: list[bool], rslora: bool, tmp_path: Path
) -> None:
    base = gpt2()
    ours = with_deltaw(
        base,
        r=3,
        lora_alpha=7,
        use_rslora=rslora,
        target_modules=["c_attn"],
        enable_lora={"c_attn": flags},
    )
    written = saved_by_deltaw(ours, tmp_path)
    close(output(ours, IDS), output(loaded_by_peft(base, written), IDS))
    read = loaded_by_deltaw(base, written)
    assert torch.equal(output(ours, IDS), output(read, IDS))
    assert {layer.enabled for layer in deltaw.capture(read).layers.values()} == {tuple(flags)}


def test_13_slices_of_a_linear_layer_are_read_by_peft(tmp_path: Path) -> None:
    base = seeded(Mlp)
    settings = {
        "target_modules": ["body.lin", "lin"],
        "enable_lora": {"body.lin": [True, False, True]},
    }
    ours = with_deltaw(base, r=2, lora_alpha=7, lora_bias=True, **settings)
    written = saved_by_deltaw(ours, tmp_path)
    close(output(ours, X), output(loaded_by_peft(base, written), X))
    assert torch.equal(output(ours, X), output(loaded_by_deltaw(base, written), X))


CONVOLUTIONS = [
    (1, 3, {}),
    (1, 3, {"stride": 2, "padding": 1}),
    (1, 1, {}),
    (2, 3, {"padding": 1}),
    (2, (3, 2), {"stride": (2, 1)}),
    (2, 1, {}),
    (2, 1, {"stride": 2}),
    (3, 2, {"padding": 1}),
    (3, (1, 1, 3), {}),
    (2, 3, {"bias": False}),
]


def space(dims: int) -> torch.Tensor:
    shape = (2, 4, *[7, 6, 5][:dims])
    return torch.linspace(-2, 2, torch.Size(shape).numel()).view(shape).sin()


@pytest.mark.parametrize(("dims", "kernel", "options"), CONVOLUTIONS)
def test_14_convolutions(
    dims: int, kernel: object, options: dict[str, object], tmp_path: Path
) -> None:
    base = seeded(lambda: Convolution(dims, kernel, **options))
    both_directions(base, space(dims), tmp_path, r=4, lora_alpha=6, target_modules=["conv"])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_14_groups_of_ours_are_read_by_peft(dims: int, tmp_path: Path) -> None:
    base = seeded(lambda: Convolution(dims, 3, groups=2))
    ours = with_deltaw(base, r=3, lora_alpha=7, target_modules=["conv"])
    written = saved_by_deltaw(ours, tmp_path)
    x = space(dims)
    close(output(ours, x), output(loaded_by_peft(base, written), x))
    read = loaded_by_deltaw(base, written)
    assert torch.equal(output(ours, x), output(read, x))
    assert deltaw.capture(read).layers["conv"].tensors["weight.lora_A"].shape[:2] == (3, 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_14_groups_of_peft_are_read_by_ours(dims: int, tmp_path: Path) -> None:
    base = seeded(lambda: Convolution(dims, 3, groups=2))
    theirs = with_peft(base, r=4, lora_alpha=7, target_modules=["conv"])
    written = saved_by_peft(theirs, tmp_path / "theirs")
    read = loaded_by_deltaw(base, written)
    x = space(dims)
    close(output(theirs, x), output(read, x))
    again = saved_by_deltaw(read, tmp_path / "again")
    for name, tensor in tensors(written).items():
        assert torch.equal(tensors(again)[name], tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular", "stride": 2},
        {"padding": "same", "dilation": 2},
    ],
)
def test_14_dilation_and_padding_against_the_formula(
    options: dict[str, object], tmp_path: Path
) -> None:
    # PEFT drops both on the way to A, so what counts is W + s B A in the layer itself.
    base = seeded(lambda: Convolution(2, 3, **options))
    ours = with_deltaw(base, r=4, lora_alpha=6, target_modules=["conv"])
    state = deltaw.capture(ours).layers["conv"]
    A, B = state.tensors["weight.lora_A"], state.tensors["weight.lora_B"]
    expected = seeded(lambda: Convolution(2, 3, **options))
    expected.conv.weight.data += 1.5 * torch.einsum("or,rikl->oikl", B, A)
    close(output(ours, space(2)), output(expected, space(2)))
    read = loaded_by_deltaw(base, saved_by_deltaw(ours, tmp_path))
    assert torch.equal(output(ours, space(2)), output(read, space(2)))


def test_18_a_bias_on_b(tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 7, "lora_bias": True}
    both_directions(seeded(Mlp), X, tmp_path / "linear", target_modules=["lin"], **settings)
    both_directions(
        seeded(lambda: Convolution(2, 3)),
        space(2),
        tmp_path / "conv",
        target_modules=["conv"],
        **settings,
    )
    base = seeded(Mlp)
    ours = with_deltaw(base, target_modules=["lin"], **settings)
    before = output(ours, X)
    deltaw.merge(ours)
    close(output(ours, X), before)


def test_18_a_bias_on_b_needs_a_bias_to_be_merged_into() -> None:
    ours = with_deltaw(seeded(Mlp), r=3, lora_bias=True, target_modules=["out"])
    with pytest.raises(deltaw.DeltawError, match="no bias"):
        deltaw.merge(ours)
