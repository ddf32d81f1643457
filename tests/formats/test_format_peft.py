"""PEFT's folder: exact names, shapes and bytes, and every way in which one can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from adapter_states import layer, same_layers, states
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from deltaw.config import LoraConfig
from deltaw.errors import FormatError
from deltaw.formats import peft
from deltaw.state import LayerState, State

P = "base_model.model."


def written(folder: Path, state: State) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    peft.write(state, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(state=states())
def test_what_is_written_reads_back_the_same(
    state: State, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    peft.write(state, folder)
    back = peft.read(folder)
    assert same_layers(back, state)
    assert back.base == state.base
    assert list(back.layers) == sorted(back.layers)
    for name in ("lora_dropout", "bias", "use_rslora", "task_type", "base_model_name_or_path"):
        assert getattr(back.config, name) == getattr(state.config, name)


def test_a_path_that_only_begins_like_pefts_wrapper_is_a_path(tmp_path: Path) -> None:
    state = State(LoraConfig(r=2), {"a": layer("linear", 2), "a.base_layers": layer("linear", 2)})
    peft.write(state, tmp_path)
    assert same_layers(peft.read(tmp_path), state)


@given(state=states())
def test_the_same_state_gives_the_same_bytes(
    state: State, tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, b, c = (tmp_path_factory.mktemp(name) for name in "abc")
    peft.write(state, a)
    peft.write(State(state.config, dict(reversed(state.layers.items())), state.base), b)
    peft.write(peft.read(a), c)
    assert files(a) == files(b) == files(c)
    assert files(a).keys() == {"adapter_config.json", "adapter_model.safetensors", "deltaw.json"}


def test_the_bytes_of_a_tiny_adapter(tmp_path: Path) -> None:
    tensors = {
        "weight.lora_A": torch.tensor([[1.0, -2.0]]),
        "weight.lora_B": torch.tensor([[0.5]]),
    }
    config = LoraConfig(r=1, lora_alpha=2, base_model_name_or_path="gpt2", revision="abc")
    peft.write(State(config, {"h.q": LayerState("linear", tensors, 2.0)}, "sha256:00"), tmp_path)
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"base_model.model.h.q.lora_A.weight":'
        b'{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"base_model.model.h.q.lora_B.weight":'
        b'{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
    )
    header += b" " * (-len(header) % 8)
    numbers = b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x3f"
    content = files(tmp_path)
    assert content["adapter_model.safetensors"] == (
        len(header).to_bytes(8, "little") + header + numbers
    )
    assert content["adapter_config.json"].decode() == (
        "{\n"
        '  "alpha_pattern": {},\n'
        '  "base_model_name_or_path": "gpt2",\n'
        '  "bias": "none",\n'
        '  "fan_in_fan_out": false,\n'
        '  "inference_mode": true,\n'
        '  "init_lora_weights": true,\n'
        '  "layers_pattern": null,\n'
        '  "layers_to_transform": null,\n'
        '  "lora_alpha": 2,\n'
        '  "lora_bias": false,\n'
        '  "lora_dropout": 0.0,\n'
        '  "modules_to_save": null,\n'
        '  "peft_type": "LORA",\n'
        '  "r": 1,\n'
        '  "rank_pattern": {},\n'
        '  "revision": "abc",\n'
        '  "target_modules": [\n'
        '    "h.q"\n'
        "  ],\n"
        '  "task_type": null,\n'
        '  "use_dora": false,\n'
        '  "use_rslora": false\n'
        "}\n"
    )
    assert content["deltaw.json"].decode() == (
        '{\n  "base": "sha256:00",\n  "deltaw": "0.1.0",\n  "layers": {}\n}\n'
    )
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


CONFIG = LoraConfig(r=3, lora_alpha=4.5)
# Section by section what a folder of PEFT's holds, shapes included.
GOLDEN = {
    "linear": (
        {"h.fc": layer("linear")},
        {"h.fc.lora_A.weight": (3, 5), "h.fc.lora_B.weight": (7, 3)},
    ),
    "conv1d": (
        {"h.c_attn": layer("conv1d")},
        {"h.c_attn.lora_A.weight": (3, 5), "h.c_attn.lora_B.weight": (7, 3)},
    ),
    "lora_bias": (
        {"h.fc": layer("linear", bias=True)},
        {
            "h.fc.lora_A.weight": (3, 5),
            "h.fc.lora_B.weight": (7, 3),
            "h.fc.lora_B.bias": (7,),
        },
    ),
    "embedding": (
        {"h.wte": layer("embedding")},
        {"h.wte.lora_embedding_A": (3, 5), "h.wte.lora_embedding_B": (7, 3)},
    ),
    "conv": (
        {"h.conv": layer("conv")},
        {"h.conv.lora_A.weight": (3, 2, 3, 1), "h.conv.lora_B.weight": (5, 3, 1, 1)},
    ),
    "conv with groups": (
        {"h.conv": layer("conv", groups=2)},
        {"h.conv.lora_A.weight": (6, 4, 3, 1), "h.conv.lora_B.weight": (10, 3, 1, 1)},
    ),
    "conv spanning the groups": (
        {"h.conv": layer("conv", groups=2, spanning=True)},
        {"h.conv.lora_A.weight": (6, 4, 3, 1), "h.conv.lora_B.weight": (10, 3, 1, 1)},
    ),
    "fused": (
        {"h.c_attn": layer("fused", bias=True)},
        {
            "h.c_attn.lora_A.weight": (6, 5),
            "h.c_attn.lora_B.weight": (12, 6),
            "h.c_attn.lora_B.bias": (12,),
        },
    ),
    "head": (
        {"h.fc": layer("linear"), "head": layer("module", trained=("weight", "bias"))},
        {
            "h.fc.lora_A.weight": (3, 5),
            "h.fc.lora_B.weight": (7, 3),
            "head.weight": (7,),
            "head.bias": (7,),
        },
    ),
    "biases": (
        {
            "h.fc": layer("linear", trained=("bias",)),
            "h.norm": layer("module", trained=("bias",)),
        },
        {
            "h.fc.lora_A.weight": (3, 5),
            "h.fc.lora_B.weight": (7, 3),
            "h.fc.base_layer.bias": (7,),
            "h.norm.bias": (7,),
        },
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_48_the_keys_and_shapes_of_every_kind(case: str, tmp_path: Path) -> None:
    layers, expected = GOLDEN[case]
    tensors, _ = written(tmp_path, State(CONFIG, layers))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        P + name: shape for name, shape in expected.items()
    }


def test_slices_are_padded_with_zeros_to_one_plain_pair(tmp_path: Path) -> None:
    fused = layer("fused", 3, scale=0.7, enabled=(True, False, True), bias=True)
    tensors, config = written(tmp_path, State(CONFIG, {"h.qkv": fused}))
    A, B = tensors[P + "h.qkv.lora_A.weight"], tensors[P + "h.qkv.lora_B.weight"]
    q, v = (fused.tensors[f"slice_{i}.lora_B"] @ fused.tensors[f"slice_{i}.lora_A"] for i in (0, 2))
    torch.testing.assert_close(B @ A, torch.cat([q, torch.zeros(4, 5), v]), rtol=0, atol=1e-6)
    assert config["r"] == 6
    assert config["lora_alpha"] / config["r"] == pytest.approx(0.7, rel=1e-15)
    assert not {"enable_lora", "deltaw"} & config.keys()
    bias = tensors[P + "h.qkv.lora_B.bias"]
    assert torch.equal(bias[4:8], torch.zeros(4))
    assert torch.equal(bias[8:], fused.tensors["slice_2.lora_B_bias"])


def test_slices_whose_zeros_are_gone_are_read_as_a_plain_linear(tmp_path: Path) -> None:
    peft.write(State(CONFIG, {"h.qkv": layer("fused")}), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[P + "h.qkv.lora_B.weight"][5, 0] = 1e-30
    _save(tmp_path, tensors)
    assert peft.read(tmp_path).layers["h.qkv"].kind == "linear"


def test_slices_without_our_own_file_are_a_plain_linear_of_the_same_delta(tmp_path: Path) -> None:
    fused = layer("fused", scale=0.7)
    peft.write(State(CONFIG, {"h.qkv": fused}), tmp_path)
    (tmp_path / "deltaw.json").unlink()
    plain = peft.read(tmp_path).layers["h.qkv"]
    delta = plain.scale * plain.tensors["weight.lora_B"] @ plain.tensors["weight.lora_A"]
    q = 0.7 * fused.tensors["slice_0.lora_B"] @ fused.tensors["slice_0.lora_A"]
    assert plain.kind == "linear"
    torch.testing.assert_close(delta[:4], q, rtol=0, atol=1e-6)


def test_a_grouped_convolution_is_repeated_for_each_group(tmp_path: Path) -> None:
    conv = layer("conv", 3, groups=2)
    tensors, config = written(tmp_path, State(CONFIG, {"h.conv": conv}))
    A = tensors[P + "h.conv.lora_A.weight"]
    compact = conv.tensors["weight.lora_A"]
    assert torch.equal(A[:3, :2], compact) and torch.equal(A[3:, 2:], compact)
    assert not A[:3, 2:].any() and not A[3:, :2].any()
    assert (config["r"], config["lora_alpha"]) == (6, 9)


def test_a_grouped_convolution_off_its_groups_stays_spanning(tmp_path: Path) -> None:
    peft.write(State(CONFIG, {"h.conv": layer("conv", groups=2)}), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[P + "h.conv.lora_A.weight"][0, 3, 0, 0] = 1e-30
    _save(tmp_path, tensors)
    back = peft.read(tmp_path).layers["h.conv"]
    assert back.groups == 2 and back.tensors["weight.lora_A"].shape == (6, 4, 3, 1)
    assert back.tensors["weight.lora_B"].shape == (10, 3)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_that_differ_are_named_by_whole_paths(
    rslora: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora)
    layers = {
        "a.x-y": layer("linear", 3, scale=config.scale(3, 5)),
        "b.a.x-y": layer("linear", 3, scale=config.scale(3, 7)),
        "c.z": layer("linear", 2, scale=config.scale(2, 5)),
    }
    _, content = written(tmp_path, State(config, layers))
    assert (content["r"], content["lora_alpha"]) == (3, 5)
    assert content["rank_pattern"] == {r"^c\.z": 2}
    assert content["alpha_pattern"] == {r"^b\.a\.x\-y": 7}
    assert content["target_modules"] == ["a.x-y", "b.a.x-y", "c.z"]
    assert content["use_rslora"] is rslora


def test_rank_and_alpha_that_no_layer_has_give_way_to_the_most_frequent(tmp_path: Path) -> None:
    layers = {f"h.{i}": layer("linear", 2, scale=8.0) for i in range(3)}
    _, content = written(tmp_path, State(CONFIG, {**layers, "z.0": layer("linear", 1, scale=8.0)}))
    assert (content["r"], content["lora_alpha"]) == (2, 16)
    assert content["rank_pattern"] == {r"^z\.0": 1} and content["alpha_pattern"] == {r"^z\.0": 8}


@given(alpha=st.floats(1e-3, 1e3), r=st.integers(1, 512), rslora=st.booleans())
def test_the_scale_survives_to_the_last_bit(
    alpha: float, r: int, rslora: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    scale = LoraConfig(use_rslora=rslora).scale(r, alpha)
    plain = LayerState(
        "linear", {"weight.lora_A": torch.ones(r, 1), "weight.lora_B": torch.ones(1, r)}, scale
    )
    peft.write(State(LoraConfig(use_rslora=rslora), {"h.x": plain}), folder)
    assert json.loads((folder / "deltaw.json").read_text())["layers"] == {}
    assert peft.read(folder).layers["h.x"].scale == scale


def test_paths_of_one_segment_are_targeted_by_a_pattern(tmp_path: Path) -> None:
    # A list with "0" would make PEFT adapt "body.0" too.
    layers = {"0": layer("linear"), "body.1": layer("linear")}
    _, content = written(tmp_path, State(CONFIG, layers))
    assert content["target_modules"] == r"0|body\.1"


@pytest.mark.parametrize(
    ("kinds", "asked", "expected"),
    [
        (("conv1d",), False, True),
        (("conv1d", "embedding"), False, True),
        (("conv1d", "linear"), False, False),
        (("linear",), True, False),
        (("fused",), True, True),
        (("fused",), False, False),
    ],
)
def test_fan_in_fan_out_says_that_all_are_conv1d(
    kinds: tuple[str, ...], asked: bool, expected: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=3, lora_alpha=4.5, fan_in_fan_out=asked)
    state = State(config, {f"h.{kind}": layer(kind) for kind in kinds})
    _, content = written(tmp_path, state)
    assert content["fan_in_fan_out"] is expected
    assert same_layers(peft.read(tmp_path), state)


TRAINED = ("weight", "bias")


@pytest.mark.parametrize(
    ("settings", "heads", "expected", "task"),
    [
        ({}, ["head"], ["head"], None),
        ({}, ["a.dense", "a.out"], ["a.dense", "a.out"], None),
        ({"modules_to_save": ["a"]}, ["a.dense", "a.out"], ["a"], None),
        ({"modules_to_save": ["a"]}, ["m.a.dense", "score"], ["m.a", "score"], None),
        ({"task_type": "SEQ_CLS"}, ["classifier.dense"], ["classifier"], "SEQ_CLS"),
        ({"task_type": "SEQ_CLS"}, ["score"], ["score"], "SEQ_CLS"),
        # PEFT looks for the head of a task by itself and fails where the file lacks it.
        ({"task_type": "SEQ_CLS"}, ["head"], ["head"], None),
        ({"task_type": "TOKEN_CLS"}, [], None, None),
        ({"task_type": "QUESTION_ANS"}, ["qa_outputs"], ["qa_outputs"], "QUESTION_ANS"),
        ({"task_type": "CAUSAL_LM"}, [], None, "CAUSAL_LM"),
    ],
)
def test_modules_to_save_are_what_peft_needs(
    settings: dict[str, object],
    heads: list[str],
    expected: list[str] | None,
    task: str | None,
    tmp_path: Path,
) -> None:
    layers = {path: layer("module", trained=TRAINED) for path in heads}
    _, content = written(
        tmp_path, State(LoraConfig(r=3, **settings), {"h.fc": layer("linear"), **layers})
    )
    assert content["modules_to_save"] == expected
    assert content["task_type"] == task


def test_a_module_with_adapted_layers_is_not_saved_as_a_whole(tmp_path: Path) -> None:
    layers = {
        "classifier.dense": layer("linear"),
        "classifier.out": layer("module", trained=TRAINED),
    }
    config = LoraConfig(r=3, modules_to_save=["classifier"], task_type="SEQ_CLS")
    _, content = written(tmp_path, State(config, layers))
    assert content["modules_to_save"] == ["classifier.out"]
    assert content["task_type"] is None


@pytest.mark.parametrize(
    ("bias", "expected"), [("all", None), ("none", ["h.norm"]), ("lora_only", ["h.norm"])]
)
def test_biases_trained_by_rule_are_no_modules_to_save(
    bias: str, expected: list[str] | None, tmp_path: Path
) -> None:
    layers = {
        "h.fc": layer("linear", trained=("bias",)),
        "h.norm": layer("module", trained=("bias",)),
    }
    _, content = written(tmp_path, State(LoraConfig(r=3, bias=bias), layers))
    assert content["modules_to_save"] == expected
    assert content["bias"] == bias


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "gpt2"),
        ("facebook/opt-350m", "facebook/opt-350m"),
        ("/home/me/model", None),
        ("./model", None),
        ("../model", None),
        ("a/b/c", None),
        ("C:\\model", None),
        ("~/model", None),
        ("here", None),
        ("here/model", None),
        ("", None),
        (None, None),
    ],
)
def test_the_base_is_named_on_the_hub_or_not_at_all(
    name: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=3, base_model_name_or_path=name, revision="main")
    _, content = written(tmp_path / "out", State(config, {"h.fc": layer("linear")}))
    assert content["base_model_name_or_path"] == expected
    assert content["revision"] == ("main" if expected else None)


def test_settings_that_chose_the_layers_are_written_as_their_result(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3,
        target_modules=["q", "v"],
        exclude_modules=["head"],
        layers_to_transform=[0],
        layers_pattern="h",
        rank_pattern={"q": 2},
        init_lora_weights="gaussian",
    )
    _, content = written(tmp_path, State(config, {"h.0.v": layer("linear")}))
    assert content["target_modules"] == ["h.0.v"]
    assert content["rank_pattern"] == {} and content["layers_to_transform"] is None
    assert content["init_lora_weights"] is True and "exclude_modules" not in content


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "it is empty"),
        ({"h.x": layer("linear", scale=0.0)}, "'h.x': the scale is 0.0, not above 0"),
        ({"h.x": layer("linear", scale=-1.0)}, "not above 0"),
        ({"h.x": layer("linear", scale=float("nan"))}, "not above 0"),
        (
            {"h.x": LayerState("conv", layer("linear").tensors, factored=True)},
            "'h.x': loralib's factors of a convolution have no form in PEFT",
        ),
        ({"h.x": layer("embedding", bias=True)}, "no bias on B of an embedding"),
        ({"h.x": layer("linear", trained=("weight",))}, "trained in full and adapted as well"),
        (
            {"h.x": LayerState("linear", {"q.lora_A": torch.ones(1, 2)})},
            "'h.x': no layer of PEFT's has 'q.lora_A'",
        ),
        (
            {"h.x": LayerState("module", {"w.trained": torch.tensor([1.0, torch.nan])})},
            "'h.x': 'w.trained' has 1 NaN or Inf of 2",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    broken: dict[str, LayerState], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as error:
        peft.write(State(CONFIG, broken), tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
