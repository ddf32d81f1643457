"""Adapters of stacked experts under PEFT and under deltaw: files both ways, and the same output."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.mixtures import COMMON, IDS, MODELS, NAMES, gpt_oss, mixtral, qwen, transformers
from peft_pair import (
    both_directions,
    close,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    quiet,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw.errors import FormatError

X = {"input_ids": IDS}
SETTINGS: dict[str, dict[str, object]] = {
    "alone": {"target_modules": [], "target_parameters": NAMES},
    "beside layers": {"target_modules": ["q_proj", "v_proj"], "target_parameters": NAMES},
    "the inner one": {"target_modules": [], "target_parameters": NAMES[:1]},
    "the outer one": {"target_modules": [], "target_parameters": NAMES[1:]},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 2, "q_proj": 1},
        "alpha_pattern": {r".*\.1\.mlp\.experts\.gate_up_proj": 7},
    },
    "rslora": {"target_modules": [], "target_parameters": NAMES, "use_rslora": True},
    "a router": {"target_modules": [], "target_parameters": ["mlp.gate.weight", NAMES[1]]},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", [mixtral, qwen], ids=["mixtral", "qwen"])
def test_files_both_ways(make: Callable[[], nn.Module], name: str, tmp_path: Path) -> None:
    both_directions(make(), X, tmp_path, r=3, lora_alpha=5, **SETTINGS[name])


def test_experts_stored_the_other_way_around(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": NAMES}
    both_directions(gpt_oss(), X, tmp_path, r=3, lora_alpha=5, **settings)


def test_biases_of_experts(tmp_path: Path) -> None:
    settings = {"target_modules": [], "target_parameters": NAMES, "bias": "all"}
    both_directions(gpt_oss(), X, tmp_path, r=3, lora_alpha=5, **settings)


class Block(nn.Module):
    """A linear layer whose weight is a parameter like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.lin(x)))


def test_one_matrix(tmp_path: Path) -> None:
    settings = {"target_modules": ["out"], "target_parameters": ["lin.weight"]}
    x = torch.linspace(-2, 2, 40).view(8, 5)
    both_directions(seeded(Block), x, tmp_path, r=3, lora_alpha=5, **settings)


def test_gradients_are_peft_s(tmp_path: Path) -> None:
    settings = {"target_modules": [], "target_parameters": NAMES, "r": 3, "lora_alpha": 5}
    theirs = with_peft(mixtral(), **settings)
    ours = mixtral()
    deltaw.load(ours, saved_by_peft(theirs, tmp_path), trainable=True)
    with quiet():
        theirs(**X, labels=IDS).loss.backward()
    ours(**X, labels=IDS).loss.backward()
    outer = theirs.base_model.model.model.layers[0].mlp.experts
    mine = ours.model.layers[0].mlp.experts.parts("default")
    for wrapper, name in ((outer, "down_proj"), (outer.base_layer, "gate_up_proj")):
        A, B = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
        grad = mine[name].lora_A.grad
        close(grad, A.view(grad.shape), 1e-5)
        grad = mine[name].lora_B.grad
        close(grad, B.view(B.shape[0], -1, 4).permute(2, 0, 1), 1e-5)


def test_two_adapters_at_once(tmp_path: Path) -> None:
    settings = {"target_modules": [], "target_parameters": NAMES, "r": 3, "lora_alpha": 5}
    theirs = [with_peft(mixtral(), seed=seed, **settings) for seed in (1, 2)]
    model = mixtral()
    for name, one in zip("ab", theirs, strict=True):
        deltaw.load(model, saved_by_peft(one, tmp_path / name), name)
    for name, one in zip("ab", theirs, strict=True):
        deltaw.activate(model, name)
        close(output(model, X), output(one, X))
    deltaw.activate(model, {"a": 0.5, "b": -1.0})
    mixed = output(model, X)
    with deltaw.merged(model):
        close(output(model, X), mixed)


def test_a_continued_adapter_is_the_one_that_was_saved(tmp_path: Path) -> None:
    ours = with_deltaw(mixtral(), r=3, target_modules=[], target_parameters=NAMES)
    state = deltaw.capture(ours)
    saved_by_deltaw(ours, tmp_path / "one")
    again = mixtral()
    deltaw.load(again, tmp_path / "one", trainable=True)
    found = deltaw.capture(again)
    assert found.base == state.base is not None
    for path, layer in state.layers.items():
        assert list(found.layers[path].tensors) == list(layer.tensors)
        for name, tensor in layer.tensors.items():
            assert torch.equal(found.layers[path].tensors[name], tensor)
    saved_by_deltaw(again, tmp_path / "two")
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_another_base_is_told(tmp_path: Path) -> None:
    saved_by_deltaw(with_deltaw(mixtral(), target_modules=[], target_parameters=NAMES), tmp_path)
    other = mixtral()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(1.5)
    with pytest.raises(FormatError, match="other weights"):
        deltaw.load(other, tmp_path)


def fewer_experts() -> nn.Module:
    config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=2, **COMMON)
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def test_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    """A (E r, in) and B (out, E r) alone would fit twice the rank."""
    written = saved_by_deltaw(
        with_deltaw(mixtral(), r=4, target_modules=[], target_parameters=NAMES), tmp_path
    )
    path = "model.layers.0.mlp.experts"
    with pytest.raises(FormatError) as caught:
        deltaw.load(fewer_experts(), written)
    for name in ("gate_up_proj", "down_proj"):
        assert f"{path}.{name}: the file has rank 16 in all, the model needs 2 x 4" in str(
            caught.value
        )


def test_what_the_settings_do_not_name_is_refused(tmp_path: Path) -> None:
    written = saved_by_peft(
        with_peft(mixtral(), r=3, target_modules=[], target_parameters=NAMES), tmp_path
    )
    file = written / "adapter_config.json"
    content = json.loads(file.read_text("utf-8"))
    for names, fragment in (
        (NAMES[:1], "factors of 2 parameters, and target_parameters takes gate_up_proj"),
        (["router"], "factors of 2 parameters, and target_parameters takes none"),
        (None, "stacked experts without target_parameters"),
    ):
        file.write_text(json.dumps(content | {"target_parameters": names}), "utf-8")
        with pytest.raises(FormatError, match=fragment):
            deltaw.load(mixtral(), written)


def test_a_lost_factor_is_told(tmp_path: Path) -> None:
    written = saved_by_peft(
        with_peft(mixtral(), r=3, target_modules=[], target_parameters=NAMES), tmp_path
    )
    held = tensors(written)
    name = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    del held[name]
    save_file(held, written / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"lora_B is missing beside .*base_layer\.lora_A"):
        deltaw.load(mixtral(), written)


def test_peft_reads_what_was_trained_here(tmp_path: Path) -> None:
    for name, make in MODELS.items():
        base = make()
        ours = base.train()
        settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
        deltaw.attach(ours, deltaw.LoraConfig(**settings, target_parameters=NAMES))
        held = [p for p in ours.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(held, lr=0.02)
        for _ in range(3):
            ours(**X, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ours.eval()
        written = saved_by_deltaw(ours, tmp_path / name)
        close(output(loaded_by_peft(make(), written), X), output(ours, X))
        close(output(loaded_by_deltaw(make(), written), X), output(ours, X), 0)
