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
    ScaledEmbedding,
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
from deltaw.errors import FormatError

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


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_19_trained_biases(bias: str, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["lin", "out"], "bias": bias}
    both_directions(seeded(Mlp), X, tmp_path, **settings)
    names = {name.removeprefix(P) for name in tensors(tmp_path / "theirs") if "lora" not in name}
    assert names == {"lin.base_layer.bias", "body.lin.base_layer.bias"} | (
        {"norm.bias", "head.bias"} if bias == "all" else set()
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_20_modules_trained_in_full(bias: str, tmp_path: Path) -> None:
    base = seeded(Mlp)
    settings = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["body.lin"],
        "modules_to_save": ["head", "norm"],
        "bias": bias,
    }
    theirs = with_peft(base, **settings)
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "theirs"))
    close(output(theirs, X), output(read, X))
    ours = with_deltaw(base, **settings)
    written = saved_by_deltaw(ours, tmp_path / "ours")
    close(output(ours, X), output(loaded_by_peft(base, written), X))
    wrapped = {"original_module", "modules_to_save"}
    assert tensors(written).keys() == {
        name for name in tensors(tmp_path / "theirs") if not wrapped & set(name.split("."))
    }


def test_20_two_adapters_with_heads_of_their_own(tmp_path: Path) -> None:
    base = seeded(Mlp)
    folders = {}
    for seed, (name, heads) in enumerate({"a": ["head"], "b": ["norm", "head"]}.items()):
        model = with_peft(
            base, name, seed, r=2, lora_alpha=5, target_modules=["lin"], modules_to_save=heads
        )
        folders[name] = saved_by_peft(model, tmp_path) / name
    theirs = loaded_by_peft(base, folders["a"], "a")
    ours = loaded_by_deltaw(base, folders["a"], "a")
    with quiet():
        theirs.load_adapter(str(folders["b"]), "b")
    deltaw.load(ours, folders["b"], "b")
    for name in ("a", "b", "a"):
        with quiet():
            theirs.set_adapter(name)
        deltaw.activate(ours, name)
        close(output(theirs, X), output(ours, X))
        for adapter in ("a", "b"):
            again = tensors(saved_by_deltaw(ours, tmp_path / "again", adapter))
            assert again.keys() == tensors(folders[adapter]).keys()


def test_20_the_head_of_a_task(tmp_path: Path) -> None:
    base = bert()
    theirs = with_peft(base, r=3, lora_alpha=7, task_type="SEQ_CLS", target_modules=["query"])
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "theirs"))
    close(output(theirs, IDS), output(read, IDS))
    ours = with_deltaw(
        base, r=3, lora_alpha=7, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=None
    )
    written = saved_by_deltaw(ours, tmp_path / "ours")
    assert tensors(written).keys() == tensors(tmp_path / "theirs").keys()
    loaded = loaded_by_peft(base, written)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    close(output(ours, IDS), output(loaded, IDS))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": []}, {"target_modules": ["query", "classifier"]}]
)
def test_20_a_classifier_without_a_trained_head_is_read_by_peft(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = bert()
    settings = {"target_modules": ["query"], "r": 3, "task_type": "SEQ_CLS", **settings}
    ours = with_deltaw(base, **settings)
    written = saved_by_deltaw(ours, tmp_path)
    close(output(ours, IDS), output(loaded_by_peft(base, written), IDS))


def test_21_trained_tokens_are_refused_by_name(tmp_path: Path) -> None:
    theirs = with_peft(
        llama(), r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]}
    )
    written = saved_by_peft(theirs, tmp_path)
    with pytest.raises(FormatError, match=r"trainable_token_indices.*trainable tokens is not"):
        loaded_by_deltaw(llama(), written)


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
