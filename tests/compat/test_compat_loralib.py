"""Scripts written for loralib run with their import changed, and give what loralib gives."""

import copy
import importlib
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.compat import loralib as ours
from deltaw.errors import ConfigError
from deltaw.formats import loralib as files

theirs = pytest.importorskip("loralib")

# As people use it: layers replaced by hand, the base loaded, the adapter trained and saved alone.
SCRIPT = """
import loralib as lora

class Net(nn.Module):
    def __init__(self, r):
        super().__init__()
        self.tokens = lora.Embedding(11, 6, r=r, lora_alpha=3)
        self.qkv = lora.MergedLinear(
            6, 12, r=r, lora_alpha=5, enable_lora=[True, False, True, False], fan_in_fan_out=True
        )
        self.up = lora.Linear(12, 9, r=r, lora_alpha=16)
        self.down = lora.Linear(9, 4, r=r, lora_alpha=16, fan_in_fan_out=True)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.qkv(self.tokens(ids)).mean(1))))

base = Net(r=0)
generator = torch.Generator().manual_seed(0)
for parameter in base.parameters():
    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
model = Net(r=2)
model.load_state_dict(base.state_dict(), strict=False)
lora.mark_only_lora_as_trainable(model, bias=bias)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

# The two libraries draw their starts in another order, so both get this one.
start = {
    name: torch.randn(tensor.shape, generator=generator) * 0.3
    for name, tensor in sorted(lora.lora_state_dict(model).items())
}
model.load_state_dict(start, strict=False)

ids, labels = torch.arange(30).reshape(6, 5) % 11, torch.arange(6) % 4
model.eval()
before = model(ids).detach()
model.train()
for _ in range(3):
    loss = F.cross_entropy(model(ids), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(lora.lora_state_dict(model, bias=bias), path)

again = Net(r=2)
again.load_state_dict(base.state_dict(), strict=False)
result = again.load_state_dict(torch.load(path), strict=False)
again.eval()
after = again(ids).detach()
"""


def run(library: str, path: Path, bias: str) -> dict[str, object]:
    names: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "path": path, "bias": bias}
    exec(SCRIPT.replace("import loralib as lora", f"import {library} as lora"), names)
    return names


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_script_gives_the_same_numbers_and_the_same_file(bias: str, tmp_path: Path) -> None:
    a = run("loralib", tmp_path / "a.pt", bias)
    b = run("deltaw.compat.loralib", tmp_path / "b.pt", bias)
    for name in ("before", "after"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(b["before"], b["after"], atol=1e-3)
    assert not b["result"].unexpected_keys
    saved = [torch.load(tmp_path / f"{name}.pt") for name in "ab"]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_files_pass_between_the_two_libraries(bias: str, tmp_path: Path) -> None:
    a = run("loralib", tmp_path / "a.pt", bias)
    b = run("deltaw.compat.loralib", tmp_path / "b.pt", bias)
    a["again"].load_state_dict(torch.load(tmp_path / "b.pt"), strict=False)
    b["again"].load_state_dict(torch.load(tmp_path / "a.pt"), strict=False)
    a["again"].train()
    torch.testing.assert_close(a["again"](a["ids"]), b["again"](b["ids"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"groups": 2}])
def test_a_convolution_equals_loralibs_and_takes_its_checkpoint(options: dict[str, int]) -> None:
    a = theirs.Conv2d(4, 6, 3, r=2, lora_alpha=5, **options)
    b = ours.Conv2d(4, 6, 3, r=2, lora_alpha=5, **options)
    assert isinstance(b, nn.Conv2d)
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "space"), [("Conv1d", (7,)), ("Conv3d", (4, 5, 6))], ids=["1d", "3d"]
)
def test_the_convolutions_that_fail_in_loralib_work(kind: str, space: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, *space)
    with pytest.raises(RuntimeError):
        getattr(theirs, kind)(4, 6, 3, r=2)(x)
    conv = getattr(ours, kind)(4, 6, 3, r=2, lora_alpha=5)
    plain = getattr(nn, kind)(4, 6, 3)
    plain.load_state_dict({name: conv.state_dict()[name] for name in ("weight", "bias")})
    assert torch.equal(conv(x), plain(x))
    nn.init.normal_(conv.lora_B)
    delta = 2.5 * (conv.lora_B @ conv.lora_A).view(conv.weight.shape)
    plain.weight.data += delta
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-4)


def test_no_slice_or_no_rank_is_the_plain_layer() -> None:
    for layer in (
        ours.MergedLinear(5, 6, r=2),
        ours.Linear(5, 6),
        ours.Embedding(5, 6),
        ours.Conv2d(5, 6, 3),
    ):
        assert "lora_A" not in layer.state_dict()
        assert all(p.requires_grad for p in layer.parameters())
        with pytest.raises(AttributeError, match="lora_A"):
            _ = layer.lora_A
    assert ours.MergedLinear(5, 6, r=2)(torch.randn(3, 5)).shape == (3, 6)


def test_before_marking_only_the_weight_is_frozen() -> None:
    for kind in (theirs.Linear, ours.Linear):
        layer = kind(5, 7, r=2)
        frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
        assert frozen == {"weight"}


@pytest.mark.parametrize("flags", [[True, False, True], [True], [False, True]])
def test_slices_need_no_transposed_weight(flags: list[bool]) -> None:
    layer = ours.MergedLinear(5, 6 * len(flags), r=2, lora_alpha=4, enable_lora=flags)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5)
    y = F.linear(x, layer.weight, layer.bias).view(3, len(flags), 6)
    A, B = layer.lora_A.view(-1, 2, 5), layer.lora_B.view(-1, 6, 2)
    on = [index for index, flag in enumerate(flags) if flag]
    for place, index in enumerate(on):
        y[:, index] = y[:, index] + 2.0 * x @ A[place].T @ B[place].T
    torch.testing.assert_close(layer(x), y.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "a": ours.Linear(5, 7, r=3, lora_alpha=7),
            "b": ours.MergedLinear(
                5, 12, r=3, lora_alpha=7, enable_lora=[True, False], fan_in_fan_out=True
            ),
            "lora_head": nn.Linear(5, 2),
        }
    )
    nn.init.normal_(layers["a"].lora_B)
    for name, parameter in layers["b"].named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return layers


def outputs(model: nn.ModuleDict) -> Tensor:
    x = torch.linspace(-1, 1, 15).view(3, 5)
    return torch.cat([model["a"](x), model["b"](x)], dim=-1)


def test_eval_and_train_touch_no_weight_and_return_the_model(model: nn.ModuleDict) -> None:
    before = copy.deepcopy(model.state_dict())
    training = outputs(model)
    assert model["a"].eval() is model["a"] and model.eval() is model
    assert torch.equal(outputs(model), training)
    saved_in_eval = model.state_dict()
    model.train()
    for name, tensor in before.items():
        assert torch.equal(saved_in_eval[name], tensor)
        assert torch.equal(model.state_dict()[name], tensor)


def test_copies_and_pickles_keep_the_adapter(model: nn.ModuleDict) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))
        assert other.state_dict().keys() == model.state_dict().keys()
        nn.init.zeros_(other["a"].lora_B)
        assert not torch.equal(outputs(other), outputs(model))


def test_only_layers_of_loralib_are_taken_for_its_layers(model: nn.ModuleDict) -> None:
    assert ours.lora_state_dict(model).keys() == {"a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"}
    ours.mark_only_lora_as_trainable(model)
    assert not any(p.requires_grad for p in model["lora_head"].parameters())
    assert theirs.lora_state_dict(model).keys() > ours.lora_state_dict(model).keys()


def test_a_checkpoint_of_the_base_alone_is_complete(model: nn.ModuleDict) -> None:
    base = {n: t for n, t in model.state_dict().items() if not n.endswith(("lora_A", "lora_B"))}
    result = model.load_state_dict(base, strict=True)
    assert not result.missing_keys and not result.unexpected_keys


def test_names_and_shapes_that_do_not_fit_are_errors(model: nn.ModuleDict) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*c\.lora_A"):
        model.load_state_dict({**model.state_dict(), "c.lora_A": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"a.lora_A": torch.ones(2, 5)}, strict=False)


@pytest.mark.parametrize("function", [ours.mark_only_lora_as_trainable, ours.lora_state_dict])
def test_an_unknown_bias_rule_is_an_error(function: object, model: nn.ModuleDict) -> None:
    with pytest.raises(ConfigError, match="bias must be none, all or lora_only"):
        function(model, bias="some")


def test_the_verbs_of_deltaw_work_on_the_model(model: nn.ModuleDict, tmp_path: Path) -> None:
    base = F.linear(torch.zeros(1, 5), model["a"].weight)
    ours.mark_only_lora_as_trainable(model)
    adapted = outputs(model)
    with deltaw.disabled(model):
        assert not torch.equal(outputs(model), adapted)
        assert torch.equal(model["a"](torch.zeros(1, 5)) - model["a"].bias, base)
    deltaw.save(model, tmp_path / "a.bin", format="loralib")
    state = files.read(tmp_path / "a.bin", lora_alpha=7, enable_lora={"b": [True, False]})
    assert {path: at.kind for path, at in state.layers.items()} == {"a": "linear", "b": "fused"}
    with deltaw.merged(model), torch.no_grad():
        torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(model), adapted)


def test_the_state_of_a_layer_that_was_merged_for_good_is_the_plain_layers(
    model: nn.ModuleDict,
) -> None:
    ours.mark_only_lora_as_trainable(model)
    adapted = outputs(model)
    file = model.state_dict()
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    state = model.state_dict()
    assert state.keys() == {name for name in file if not name.endswith(("lora_A", "lora_B"))}
    model.load_state_dict(state)
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    assert ours.lora_state_dict(model) == {}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*a\.lora_A"):
        model.load_state_dict(file)


def test_a_second_adapter_keeps_its_names_where_loralibs_was_detached(
    model: nn.ModuleDict,
) -> None:
    ours.mark_only_lora_as_trainable(model)
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["a"], modules_to_save=[]), "other")
    nn.init.normal_(model["a"].get_parameter("adapter.other.weight.lora_B"))
    deltaw.detach(model, "default")
    deltaw.activate(model, "other")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "a.adapter.other.weight.lora_A" in state and "a.lora_A" not in state
    adapted = outputs(model)
    nn.init.zeros_(model["a"].get_parameter("adapter.other.weight.lora_B"))
    assert not torch.equal(outputs(model), adapted)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), adapted)
    with pytest.raises(AttributeError, match="lora_A"):
        _ = model["a"].lora_A


def test_every_name_is_there() -> None:
    for name in (
        "Linear",
        "Embedding",
        "MergedLinear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "LoRALayer",
        "mark_only_lora_as_trainable",
        "lora_state_dict",
    ):
        assert hasattr(theirs, name)
        assert hasattr(importlib.import_module("deltaw.compat.loralib"), name)
    assert isinstance(ours, ModuleType)
