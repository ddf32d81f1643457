"""`nn.MultiheadAttention` through files, both ways.

PEFT's own forward counts the output's ΔW twice, so outputs are compared with the formula: the base
with W + ΔW of the tensors that PEFT holds.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft_pair import (
    close,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    peft,
    quiet,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)
from torch import Tensor, nn

import deltaw

X = torch.linspace(-2, 2, 48).view(4, 2, 6).sin()
SETTINGS = {"r": 2, "lora_alpha": 3, "target_modules": ["attn", "lin"]}


class Attending(nn.Module):
    """An attention and a linear layer."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 3, **options)
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all, project."""
        keys, values = x[..., : self.attn.kdim], x[..., : self.attn.vdim]
        same = keys.shape == x.shape == values.shape
        return self.lin(self.attn(*((x, x, x) if same else (x, keys, values)))[0])


def base(**options: object) -> nn.Module:
    return seeded(lambda: Attending(**options))


@torch.no_grad()
def formula(plain: nn.Module, theirs: nn.Module) -> nn.Module:
    """The base with what PEFT's modules hold in its weights, each ΔW once."""
    model, held = copy.deepcopy(plain), theirs.base_model.model
    model.attn.in_proj_weight += held.attn.get_delta_weight("default")
    model.attn.out_proj.weight += held.attn.base_layer.out_proj.get_delta_weight("default")
    model.lin.weight += held.lin.get_delta_weight("default")
    return model


def test_a_file_of_pefts(tmp_path: Path) -> None:
    """Queries, keys and values share its A; written again it is the same file."""
    theirs = with_peft(base(), **SETTINGS)
    written = saved_by_peft(theirs, tmp_path / "theirs")
    ours = loaded_by_deltaw(base(), written)
    close(output(ours, X), output(formula(base(), theirs), X))
    held = deltaw.capture(ours).layers["attn"].tensors
    assert torch.equal(held["q.lora_A"], held["k.lora_A"])
    assert deltaw.configs(ours)["default"].enable_lora == {"^attn": [True] * 4}
    again = tensors(saved_by_deltaw(ours, tmp_path / "again"))
    assert again.keys() == tensors(written).keys()
    assert all(torch.equal(again[name], t) for name, t in tensors(written).items())


def test_pefts_own_forward_still_counts_the_output_twice(tmp_path: Path) -> None:
    """When this fails, outputs can be compared with PEFT's."""
    theirs = with_peft(base(), **SETTINGS)
    assert not torch.allclose(output(theirs, X), output(formula(base(), theirs), X), atol=1e-3)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    theirs = with_peft(base(), **SETTINGS, bias=bias)
    written = saved_by_peft(theirs, tmp_path / "theirs")
    name = "base_model.model.attn.base_layer.out_proj.base_layer.bias"
    ours = loaded_by_deltaw(base(), written)
    assert torch.equal(ours.attn.out_proj.bias, tensors(written)[name])
    again = tensors(saved_by_deltaw(ours, tmp_path / "again"))
    assert again.keys() == tensors(written).keys()
    own = with_deltaw(base(), **SETTINGS, bias=bias)
    read = loaded_by_peft(base(), saved_by_deltaw(own, tmp_path / "ours"))
    held = read.base_model.model.attn.base_layer.out_proj.base_layer.bias
    assert torch.equal(held, own.attn.out_proj.bias)


MARKS = [(1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1), (0, 1, 0, 0)]


@pytest.mark.parametrize("marks", MARKS, ids=str)
def test_slots_are_stacked(marks: tuple[int, ...], tmp_path: Path) -> None:
    """PEFT loads them, and they come back to the last bit; without the note as the same ΔW."""
    enabled = {"attn": [bool(mark) for mark in marks]}
    ours = with_deltaw(base(), **SETTINGS, enable_lora=enabled, rank_pattern={"attn": 3})
    written = saved_by_deltaw(ours, tmp_path)
    theirs = loaded_by_peft(base(), written)
    close(output(ours, X), output(formula(base(), theirs), X))
    read = loaded_by_deltaw(base(), written)
    state = ours.state_dict()
    assert read.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in read.state_dict().items())
    (written / "deltaw.json").unlink()
    close(output(loaded_by_deltaw(base(), written), X), output(ours, X))


def test_a_file_that_another_program_changed_is_read_as_it_is(tmp_path: Path) -> None:
    """The note on its slots no longer holds then."""
    from safetensors.torch import save_file

    ours = with_deltaw(base(), **SETTINGS)
    written = saved_by_deltaw(ours, tmp_path)
    found = tensors(written)
    found["base_model.model.attn.lora_B.weight"] += 0.1
    save_file(found, written / "adapter_model.safetensors")
    theirs = loaded_by_peft(base(), written)
    close(output(loaded_by_deltaw(base(), written), X), output(formula(base(), theirs), X))


REFUSED = {
    "own widths": ({"kdim": 5, "vdim": 4}, {}, "Only same embed"),
    "DoRA": ({}, {"use_dora": True}, "does not support DoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_pefts_attention_cannot_be(kind: str, tmp_path: Path) -> None:
    """deltaw writes and reads it slot by slot; PEFT refuses it, and loses nothing in silence."""
    options, settings, message = REFUSED[kind]
    ours = with_deltaw(base(**options), r=2, target_modules=["attn"], **settings, bias="lora_only")
    written = saved_by_deltaw(ours, tmp_path)
    assert "base_model.model.attn.q.lora_A.weight" in tensors(written)
    assert json.loads((written / "adapter_config.json").read_text())["target_modules"] == "attn"
    assert torch.equal(output(loaded_by_deltaw(base(**options), written), X), output(ours, X))
    with quiet(), pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base(**options), str(written))


def test_a_transposed_convolution_is_refused_by_peft(tmp_path: Path) -> None:
    make = lambda: seeded(lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2, groups=2)))  # noqa: E731
    ours = with_deltaw(make(), r=2, target_modules=["0"])
    written = saved_by_deltaw(ours, tmp_path)
    x = torch.linspace(-1, 1, 40).view(2, 4, 5)
    assert torch.equal(output(loaded_by_deltaw(make(), written), x), output(ours, x))
    with quiet(), pytest.raises(ValueError, match=r"ConvTranspose1d.* is not supported"):
        peft.PeftModel.from_pretrained(make(), str(written))
