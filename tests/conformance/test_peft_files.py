"""Files of PEFT and of deltaw read by the other; the numbers are those of the list of checks."""

import json
from pathlib import Path

import pytest
import torch
from peft_pair import (
    IDS,
    TARGETS,
    Convolution,
    Mlp,
    Tokens,
    X,
    bert,
    both_directions,
    close,
    gpt2,
    llama,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    peft,
    quiet,
    randomise,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)
from torch import nn
from torch.nn import functional as F

import deltaw

P = "base_model.model."


@pytest.mark.parametrize("r", [1, 3, 8])
def test_01_linear_layers(r: int, tmp_path: Path) -> None:
    both_directions(seeded(Mlp), X, tmp_path, r=r, lora_alpha=5, target_modules=TARGETS)


@pytest.mark.parametrize("model", [llama, bert, gpt2])
def test_01_transformers(model: object, tmp_path: Path) -> None:
    both_directions(model(), IDS, tmp_path, r=3, lora_alpha=7, target_modules="all-linear")


def test_02_training_gives_the_same_tensors(tmp_path: Path) -> None:
    base = seeded(Mlp)
    theirs = with_peft(base, r=3, lora_alpha=7, target_modules=TARGETS)
    ours = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "start"))
    for name, p in ours.named_parameters():
        p.requires_grad_(".adapter." in name)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    a = tensors(saved_by_peft(theirs, tmp_path / "theirs"))
    b = tensors(saved_by_deltaw(ours, tmp_path / "ours"))
    start = tensors(tmp_path / "start")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        close(tensor, b[name])
        assert not torch.allclose(tensor, start[name], atol=1e-4)
    close(output(theirs, X), output(loaded_by_peft(base, tmp_path / "ours"), X))
    for name, tensor in tensors(
        saved_by_deltaw(loaded_by_deltaw(base, tmp_path / "theirs"), tmp_path / "again")
    ).items():
        assert torch.equal(tensor, a[name])


@pytest.mark.parametrize("name", ["default", "other", "lora_A", "lin", "weight", "body"])
def test_03_the_name_of_an_adapter_makes_no_difference(name: str, tmp_path: Path) -> None:
    base = seeded(Mlp)
    theirs = with_peft(base, "first", r=3, lora_alpha=7, target_modules=TARGETS)
    folder = saved_by_peft(theirs, tmp_path / "theirs") / "first"
    ours = loaded_by_deltaw(base, folder, name)
    close(output(theirs, X), output(ours, X))
    again = saved_by_deltaw(ours, tmp_path / "ours", name)
    assert tensors(again).keys() == tensors(folder).keys()
    close(output(theirs, X), output(loaded_by_peft(base, again, "x"), X))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_04_a_fresh_adapter_changes_nothing(init: object, tmp_path: Path) -> None:
    base = seeded(Mlp)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "init_lora_weights": init}
    fresh = seeded(Mlp)
    deltaw.attach(fresh, deltaw.LoraConfig(**settings, modules_to_save=[]))
    assert torch.equal(output(fresh, X), output(base, X))
    read = loaded_by_peft(base, saved_by_deltaw(fresh, tmp_path / "ours"))
    assert torch.equal(output(read, X), output(base, X))
    with quiet():
        theirs = peft.get_peft_model(seeded(Mlp), peft.LoraConfig(**settings)).eval()
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "theirs"))
    assert torch.equal(output(read, X), output(base, X))


def scales_of_peft(model: nn.Module) -> dict[str, float]:
    return {
        name.removeprefix(P): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }


def scales_of_deltaw(model: nn.Module) -> dict[str, float]:
    return {path: layer.scale for path, layer in deltaw.capture(model).layers.items()}


PATTERNS = [
    {},
    {"rank_pattern": {"lin": 2}},
    {"alpha_pattern": {"body.lin": 11}},
    {"rank_pattern": {"^lin": 2, "out": 5}, "alpha_pattern": {"lin": 11, "^body.out": 3}},
    {"rank_pattern": {".*lin": 4}, "alpha_pattern": {"l[i]n": 9}},
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_05_06_07_scales_of_every_layer(
    patterns: dict[str, object], rslora: bool, tmp_path: Path
) -> None:
    base = seeded(Mlp)
    settings = {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": rslora,
        "target_modules": TARGETS,
        **patterns,
    }
    theirs = with_peft(base, **settings)
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "a"))
    assert scales_of_deltaw(read) == scales_of_peft(theirs)
    ours = with_deltaw(base, **settings)
    assert scales_of_deltaw(ours) == scales_of_peft(theirs)
    written = saved_by_deltaw(ours, tmp_path / "b")
    assert scales_of_peft(loaded_by_peft(base, written)) == scales_of_deltaw(ours)
    both_directions(base, X, tmp_path, **settings)


class OddNames(nn.Module):
    """Modules called what code that works on substrings of keys would trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(5, 5)
        self.bias = nn.Linear(5, 5)
        self.lora_x = nn.Linear(5, 5)
        self.default = nn.Linear(5, 5)
        self.base_layers = nn.Linear(5, 5)
        self.my_modules_to_save = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


ODD = ["weight", "bias", "lora_x", "base_layers", "my_modules_to_save"]


@pytest.mark.parametrize("targets", [[name] for name in [*ODD, "default"]] + [ODD])
def test_34_odd_names_of_modules(targets: list[str], tmp_path: Path) -> None:
    both_directions(seeded(OddNames), X, tmp_path, r=3, lora_alpha=7, target_modules=targets)


@pytest.mark.parametrize("name", ["weight", "lora_x"])
def test_34_odd_names_of_heads(name: str, tmp_path: Path) -> None:
    base = seeded(OddNames)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["bias"], "modules_to_save": [name]}
    both_directions(base, X, tmp_path, **settings)


@pytest.mark.parametrize("name", ["lora", "lin", "lora_x", "bias"])
def test_34_odd_names_of_adapters(name: str, tmp_path: Path) -> None:
    base = seeded(OddNames)
    ours = with_deltaw(base, name, r=3, lora_alpha=7, target_modules=ODD)
    written = saved_by_deltaw(ours, tmp_path, name)
    assert torch.equal(output(ours, X), output(loaded_by_deltaw(base, written, name), X))
    close(output(ours, X), output(loaded_by_peft(base, written), X))


KEYS = {
    "linear": (lambda: seeded(Mlp), {"target_modules": ["lin"]}),
    "lora_bias": (lambda: seeded(Mlp), {"target_modules": ["body.lin"], "lora_bias": True}),
    "bias all": (lambda: seeded(Mlp), {"target_modules": ["lin"], "bias": "all"}),
    "bias lora_only": (lambda: seeded(Mlp), {"target_modules": ["lin"], "bias": "lora_only"}),
    "head": (lambda: seeded(Mlp), {"target_modules": ["lin"], "modules_to_save": ["head"]}),
    "embedding": (lambda: seeded(Tokens), {"target_modules": ["emb"]}),
    "conv1d of gpt2": (gpt2, {"target_modules": ["c_attn"]}),
    "conv 1d": (lambda: seeded(lambda: Convolution(1)), {"target_modules": ["conv"]}),
    "conv 3d": (lambda: seeded(lambda: Convolution(3)), {"target_modules": ["conv"]}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", KEYS)
def test_48_keys_shapes_and_dtypes_are_those_of_peft(case: str, tmp_path: Path) -> None:
    make, settings = KEYS[case]
    settings = {"r": 4, "lora_alpha": 6, **settings}
    a = tensors(saved_by_peft(with_peft(make(), **settings), tmp_path / "theirs"))
    b = tensors(saved_by_deltaw(with_deltaw(make(), **settings), tmp_path / "ours"))
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {
        n: (t.shape, t.dtype) for n, t in b.items()
    }
    theirs, ours = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("theirs", "ours")
    )
    assert ours.keys() <= theirs.keys()
    for name in ours.keys() - {"target_modules", "init_lora_weights", "fan_in_fan_out"}:
        assert ours[name] == theirs[name], name


def test_the_real_file_of_another_run_gives_the_logits_of_peft(shared: Path) -> None:
    folder = shared / "adapters" / "peft_roberta_base_mrpc_r8"
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=60, max_position_embeddings=20, type_vocab_size=1, num_hidden_layers=12
    )
    base = seeded(lambda: transformers.RobertaForSequenceClassification(config))
    theirs, ours = loaded_by_peft(base, folder), loaded_by_deltaw(base, folder)
    close(output(theirs, IDS), output(ours, IDS), 1e-5)
    with deltaw.merged(ours):
        close(output(theirs, IDS), output(ours, IDS), 1e-5)


def test_the_formula_itself(tmp_path: Path) -> None:
    """Both could be wrong in the same way: here is W + alpha / r B A by hand."""
    base = seeded(Mlp)
    theirs = with_peft(base, r=3, lora_alpha=7, target_modules=["lin"], bias="none")
    ours = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path))
    file = tensors(tmp_path)
    h = X
    for path in ("lin", "body.lin"):
        layer = base.get_submodule(path)
        A, B = (file[f"{P}{path}.lora_{side}.weight"] for side in "AB")
        h = torch.tanh(F.linear(h, layer.weight + 7 / 3 * B @ A, layer.bias))
    expected = base.head(base.norm(base.body["out"](h)))
    close(output(ours, X), expected.detach())
    assert randomise(ours) is ours


class Inner(nn.Module):
    """A path that is the end of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"lin": nn.Linear(5, 5)})
        self.outer = nn.ModuleDict({"body": nn.ModuleDict({"lin": nn.Linear(5, 5)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer["body"]["lin"](self.body["lin"](x))


def test_a_layer_whose_path_ends_in_that_of_an_adapted_one_is_not_changed(tmp_path: Path) -> None:
    ours = with_deltaw(
        seeded(Inner), target_modules=["body.lin"], exclude_modules=["outer.body.lin"]
    )
    written = saved_by_deltaw(ours, tmp_path)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(seeded(Inner), str(written)).eval()
    assert hasattr(loaded.base_model.model.outer["body"]["lin"], "lora_A")
    close(output(ours, X), output(loaded, X))
