"""loralib's files, against loralib itself and against the real one of its authors."""

import collections
from pathlib import Path

import pytest
import torch
from adapter_states import layer, same_layer, same_layers
from torch import Tensor, nn

from deltaw.config import LoraConfig
from deltaw.errors import DeltawError, FormatError
from deltaw.formats import loralib
from deltaw.state import LayerState, State

lib = pytest.importorskip("loralib")


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def saved(model: nn.Module, path: Path, bias: str = "none") -> Path:
    torch.save(lib.lora_state_dict(model, bias=bias), path)
    return path


def refusal(path: Path, **settings: object) -> str:
    with pytest.raises(FormatError) as error:
        loralib.read(path, **settings)
    assert str(path) in str(error.value)
    return str(error.value)


def delta(at: LayerState) -> Tensor:
    """s B A by the definition, with the slices of a fused layer in their places."""
    if at.kind != "fused":
        return at.scale * at.tensors["weight.lora_B"] @ at.tensors["weight.lora_A"]
    slots = [f"slice_{index}" for index in range(len(at.enabled))]
    A = [at.tensors.get(f"{slot}.lora_A") for slot in slots]
    B = [at.tensors.get(f"{slot}.lora_B") for slot in slots]
    width = next(a.shape[1] for a in A if a is not None)
    rows = next(b.shape[0] for b in B if b is not None)
    return torch.cat(
        [
            torch.zeros(rows, width) if a is None else at.scale * b @ a
            for a, b in zip(A, B, strict=True)
        ]
    )


def test_linear_and_embedding_of_loralib(tmp_path: Path) -> None:
    model = randomised(
        nn.ModuleDict(
            {"q": lib.Linear(5, 7, r=3, lora_alpha=4), "e": lib.Embedding(11, 5, r=2, lora_alpha=4)}
        )
    )
    state = loralib.read(saved(model, tmp_path / "a.bin"), lora_alpha=4)
    x = torch.randn(6, 5)
    q = model["q"]
    torch.testing.assert_close(
        nn.functional.linear(x, q.weight + delta(state.layers["q"]), q.bias), q(x)
    )
    e = model["e"]
    ids = torch.arange(11)
    torch.testing.assert_close(e.weight + delta(state.layers["e"]).T, e(ids))
    assert {at.scale for at in state.layers.values()} == {4 / 3, 2.0}
    assert (state.config.r, state.config.lora_alpha) == (2, 4)
    assert state.config.rank_pattern == {"^q": 3}


@pytest.mark.parametrize(
    "flags", [[True, False, True], [False, True], [True, True], [False, False, True, False]]
)
def test_merged_linear_of_loralib(flags: list[bool], tmp_path: Path) -> None:
    # loralib's own forward fits only with fan_in_fan_out, one of its known defects.
    width = 3 * len(flags)
    attn = lib.MergedLinear(5, width, r=2, lora_alpha=3, enable_lora=flags, fan_in_fan_out=True)
    model = randomised(nn.ModuleDict({"c_attn": attn}))
    path = saved(model, tmp_path / "a.pt")
    state = loralib.read(path, lora_alpha=3, enable_lora={"c_attn": flags})
    at = state.layers["c_attn"]
    assert (at.kind, at.enabled, at.scale) == ("fused", tuple(flags), 1.5)
    assert state.config.enable_lora == {"^c_attn": flags}
    torch.testing.assert_close(delta(at), (attn.merge_AB() * attn.scaling).T)


def test_slices_are_asked_for_where_the_file_does_not_say(tmp_path: Path) -> None:
    attn = lib.MergedLinear(5, 9, r=2, enable_lora=[True, False, True], fan_in_fan_out=True)
    path = saved(nn.ModuleDict({"h": nn.ModuleDict({"c_attn": attn})}), tmp_path / "a.pt")
    message = refusal(path, lora_alpha=1)
    assert "'h.c_attn' adapts 2 slices of a fused layer without saying which" in message
    assert "enable_lora={'c_attn': [...]} with 2 True" in message
    for flags in ([True, False, False], [True, True, True]):
        message = refusal(path, lora_alpha=1, enable_lora={"c_attn": flags})
        assert f"do not fit the slices {flags}" in message


@pytest.mark.parametrize("given", [None, 2])
def test_a_convolution_is_told_by_its_rank(given: int | None, tmp_path: Path) -> None:
    conv = lib.Conv2d(4, 6, 3, r=2, lora_alpha=5, groups=2)
    model = randomised(nn.ModuleDict({"c": conv}))
    path = saved(model, tmp_path / "a.bin", bias="all")
    state = loralib.read(path, lora_alpha=5, r=given)
    at = state.layers["c"]
    assert at.factored is (given is not None)
    assert at.kind == ("conv" if given else "linear")
    # What attach does for a convolution that was read without its rank.
    scale = at.scale if at.factored else at.scale * 3
    product = at.tensors["weight.lora_B"] @ at.tensors["weight.lora_A"]
    x = torch.randn(2, 4, 5, 5)
    W = conv.conv.weight + scale * product.view(conv.conv.weight.shape)
    torch.testing.assert_close(
        nn.functional.conv2d(x, W, conv.conv.bias, groups=2), conv(x), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(at.tensors["bias.trained"], conv.conv.bias)


def test_a_rank_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    path = saved(nn.ModuleDict({"q": lib.Linear(5, 7, r=3)}), tmp_path / "a.bin")
    assert "'q': lora_A (3, 5) and lora_B (7, 3) do not fit r=2" in refusal(path, lora_alpha=1, r=2)


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = saved(nn.ModuleDict({"q": lib.Linear(5, 7, r=3)}), tmp_path / "a.bin")
    message = refusal(path)
    assert "it does not say lora_alpha, so pass lora_alpha=" in message
    assert "Fix: call deltaw.formats.loralib.read" in message


@pytest.mark.parametrize(
    ("bias", "rule", "biases"),
    [("none", "none", []), ("lora_only", "lora_only", ["q"]), ("all", "all", ["k", "q"])],
)
def test_biases_are_read_by_loralibs_rules(
    bias: str, rule: str, biases: list[str], tmp_path: Path
) -> None:
    model = randomised(nn.ModuleDict({"q": lib.Linear(5, 7, r=3), "k": nn.Linear(5, 7)}))
    state = loralib.read(saved(model, tmp_path / "a.bin", bias), lora_alpha=1)
    assert state.config.bias == rule and state.config.modules_to_save == []
    found = [path for path, at in state.layers.items() if "bias.trained" in at.tensors]
    assert found == biases
    for path in found:
        assert torch.equal(state.layers[path].tensors["bias.trained"], model[path].bias)


def test_the_authors_own_file(shared: Path) -> None:
    file = shared / "adapters" / "loralib_roberta_base_mnli" / "roberta_base_lora_mnli.bin"
    assert loralib.sniff(file)
    state = loralib.read(file, lora_alpha=16)
    assert len(state.layers) == 26 and state.config.r == 8
    assert state.config.modules_to_save == ["classifier.dense", "classifier.out_proj"]
    assert state.layers["roberta.encoder.layer.11.attention.self.value"].scale == 2.0
    mlx = shared / "adapters" / "mlx_qwen25_05b_dpo_2iters" / "adapters.safetensors"
    assert not loralib.sniff(mlx)
    assert "those of MLX's format" in refusal(mlx)


CONFIG = LoraConfig(r=3, lora_alpha=7)
FACTORED = LayerState(
    "conv",
    {"weight.lora_A": torch.randn(6, 10), "weight.lora_B": torch.randn(4, 6)},
    7 / 3,
    factored=True,
)
ROUND = State(
    CONFIG,
    {
        "h.q": layer("linear", scale=7 / 3, trained=("bias",)),
        "h.k": layer("linear", 2, scale=7 / 2),
        "h.qkv": layer("fused", scale=7 / 3, trained=("bias",)),
        "head": layer("module", trained=("weight", "bias")),
    },
)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.safetensors", "folder"])
def test_what_is_written_reads_back_the_same(name: str, tmp_path: Path) -> None:
    loralib.write(ROUND, tmp_path / name)
    assert loralib.sniff(tmp_path / name)
    enable_lora = {"qkv": [True, False, True]}
    back = loralib.read(tmp_path / name, lora_alpha=7, enable_lora=enable_lora)
    assert same_layers(back, ROUND)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    loralib.write(back, tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert len(before) == 1


def test_a_factored_convolution_reads_back_the_same(tmp_path: Path) -> None:
    at = LayerState(
        "conv", {**FACTORED.tensors, "bias.trained": torch.randn(4)}, 7 / 3, factored=True
    )
    loralib.write(State(CONFIG, {"c": at}), tmp_path / "a.bin")
    assert torch.load(tmp_path / "a.bin", weights_only=True).keys() == {
        "c.lora_A",
        "c.lora_B",
        "c.conv.bias",
    }
    back = loralib.read(tmp_path / "a.bin", lora_alpha=7, r=3)
    assert same_layer(back.layers["c"], at)


def test_loralib_loads_what_is_written(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "q": lib.Linear(5, 7, r=3, lora_alpha=7),
            "qkv": lib.MergedLinear(
                5, 12, r=3, lora_alpha=7, enable_lora=[True, False, True], fan_in_fan_out=True
            ),
        }
    )
    state = State(CONFIG, {p.removeprefix("h."): at for p, at in ROUND.layers.items()})
    loralib.write(state, tmp_path / "a.bin")
    content = torch.load(tmp_path / "a.bin", weights_only=True)
    del content["k.lora_A"], content["k.lora_B"], content["head.weight"], content["head.bias"]
    del content["qkv.bias"]
    result = model.load_state_dict(content, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith(("weight", "bias")) for name in result.missing_keys)
    torch.testing.assert_close(
        delta(state.layers["q"]), model["q"].lora_B @ model["q"].lora_A * model["q"].scaling
    )
    merged = (model["qkv"].merge_AB() * model["qkv"].scaling).T
    torch.testing.assert_close(delta(state.layers["qkv"]), merged)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (layer("linear", scale=2.0), "it has no scale of its own, and 2.0 is not lora_alpha / r"),
        (layer("linear", scale=7 / 3, bias=True), "it has no bias on B"),
        (layer("conv", scale=7 / 3), "its convolutions are factored otherwise"),
        (
            LayerState(
                "linear",
                {"weight.lora_A": torch.full((3, 2), torch.inf), "weight.lora_B": torch.ones(2, 3)},
                7 / 3,
            ),
            "'weight.lora_A' has 6 NaN or Inf of 6",
        ),
        (
            LayerState(
                "fused",
                {
                    "slice_0.lora_A": torch.ones(3, 2),
                    "slice_0.lora_B": torch.ones(2, 3),
                    "slice_1.lora_A": torch.ones(1, 2),
                    "slice_1.lora_B": torch.ones(2, 1),
                },
                7 / 3,
                (True, True),
            ),
            "its slices have one rank",
        ),
        (layer("module", trained=("weight",)), "it has no low-rank layer"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    at: LayerState, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as error:
        loralib.write(State(CONFIG, {"h.x": at}), tmp_path / "a.bin")
    assert message in str(error.value) and "PEFT's format" in str(error.value)
    assert not any(tmp_path.iterdir())


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    content = {
        "a.lora_A": torch.ones(3, 5),
        "b.lora_B": torch.ones(7, 3),
        "c.lora_A": torch.ones(3, 5),
        "c.lora_B": torch.ones(7, 2),
        "d.lora_A": torch.ones(3, 5, dtype=torch.int64),
        "d.lora_B": torch.ones(7, 3),
        "e.lora_A": torch.ones(3, 5, 1),
        "e.lora_B": torch.ones(7, 3),
        "f.lora_A": torch.ones(2, 5),
        "f.lora_B": torch.ones(7, 2),
        "f.weight": torch.ones(7, 5),
        "g.lora_A": torch.ones(0, 5),
        "g.lora_B": torch.ones(7, 0),
    }
    torch.save(content, tmp_path / "a.bin")
    message = refusal(tmp_path / "a.bin")
    for text in (
        "pass lora_alpha=",
        "'a.lora_B' is missing",
        "'b.lora_A' is missing",
        "'c': lora_A (3, 5) and lora_B (7, 2) do not fit",
        "'d' holds torch.int64",
        "'e': lora_A (3, 5, 1) and lora_B (7, 3) do not fit",
        "'f.weight' is a base weight; save lora_state_dict(model) alone",
        "'g': lora_A (0, 5) and lora_B (7, 0) do not fit",
    ):
        assert text in message
    assert message.count("\n  - ") == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": torch.ones(1)}, "it has no tensor named lora_A"),
        (
            {"base_model.model.q.lora_A.weight": torch.ones(1, 1)},
            "are PEFT's: name the folder with its adapter_config.json",
        ),
        ({"q.lora_a": torch.ones(1, 1)}, "those of MLX's format"),
    ],
)
def test_files_of_others_are_named(
    content: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    torch.save(collections.OrderedDict(content), tmp_path / "a.bin")
    assert message in refusal(tmp_path / "a.bin", lora_alpha=1)


def test_files_that_are_not_there_or_damaged_are_named(tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "a.bin", lora_alpha=1)
    assert "There is no file" in refusal(tmp_path, lora_alpha=1)
    assert not loralib.sniff(tmp_path) and not loralib.sniff(tmp_path / "a.bin")
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        refusal(tmp_path / name, lora_alpha=1)
    assert not loralib.sniff(tmp_path / "a.safetensors")


def test_files_of_peft_are_left_to_its_format(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert not loralib.sniff(tmp_path / "adapter_model.bin")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loralib.write(ROUND, tmp_path / "a.bin")
    before = (tmp_path / "a.bin").read_bytes()

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(DeltawError, match="No space left on device"):
        loralib.write(State(CONFIG, {"h.k": layer("linear", 2, scale=7 / 2)}), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
