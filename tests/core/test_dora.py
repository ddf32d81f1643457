"""DoRA where it is more than another adapter of the laws: its start, its inputs, its company."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw.adapters.dora import DoraAdapter
from deltaw.errors import ConfigError, FormatError, StateError, TargetError
from deltaw.kernels import shared
from deltaw.kernels.norms import row_norms

peft = pytest.importorskip("peft")


def mlp(inplace: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace), nn.Linear(5, 9, bias=False)).to(dtype)


def trained(model: nn.Module, **settings: object) -> nn.Module:
    """With random numbers in every tensor of the adapter."""
    values = {"r": 3, "lora_alpha": 5, "use_dora": True, **settings}
    deltaw.attach(model, deltaw.LoraConfig(**values))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model


def inputs() -> torch.Tensor:
    return torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    held = [p for p in model.parameters() if p.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), held)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_are_those_of_the_sum(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=g, dtype=dtype) for s in ((7, 5), (3, 5), (7, 3)))
    expected = (W.double() + 1.7 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(W, A, B, 1.7).double(), expected, rtol=1e-6, atol=0)
    assert not row_norms(W, A.requires_grad_(), B, 1.7).requires_grad


def test_two_names_for_one_method() -> None:
    assert deltaw.LoraConfig(use_dora=True).method == "dora"
    assert deltaw.LoraConfig(method="dora").use_dora
    assert not deltaw.LoraConfig().use_dora
    for made in (deltaw.LoraConfig(use_dora=True), deltaw.LoraConfig(method="dora")):
        assert replace(made, r=3).use_dora
        for change in ({"use_dora": False}, {"method": "lora"}):
            with pytest.raises(ConfigError, match="contradicts method"):
                replace(made, **change)
        assert replace(made, use_dora=False, method="lora") == deltaw.LoraConfig()
    with pytest.raises(ConfigError, match="use_dora must be True or False"):
        deltaw.LoraConfig(use_dora="yes")


def test_parameters_are_counted() -> None:
    model = mlp()
    made = deltaw.attach(model, deltaw.LoraConfig(r=3, use_dora=True))
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.parameters == held == 3 * (7 + 5) + 5 + 3 * (5 + 9) + 9


def test_rows_of_zeros_are_refused_all_at_once() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    model[0].weight.data[3] = 0
    model[2].weight.data[[1, 8]] = 0
    with pytest.raises(TargetError) as caught:
        deltaw.attach(model, deltaw.LoraConfig(use_dora=True))
    assert "- 0: DoRA needs a direction, and output 3 has a weight of zeros" in str(caught.value)
    assert "- 2: DoRA needs a direction, and output 1, 8 has a weight" in str(caught.value)
    assert "exclude_modules" in str(caught.value)
    assert list(model.state_dict()) == list(before)
    assert type(model[0]) is nn.Linear


def test_a_change_in_place_is_refused() -> None:
    """The output is kept for the magnitude's gradient, in a recomputed block too."""
    model, x = trained(mlp(inplace=True)), inputs()
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradients(model, model(x))
    with pytest.raises(RuntimeError, match=r"changed in place.*\nFix: .*inplace=False"):
        gradients(model, checkpoint(model, x, use_reentrant=False))


def test_twice_differentiable_it_is_not() -> None:
    model = trained(mlp())
    x = inputs().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_no_reserve(tmp_path: Path) -> None:
    deltaw.save(trained(mlp(dtype=torch.float32)), tmp_path)
    with pytest.raises(StateError, match="its method is dora"):
        deltaw.load(mlp(dtype=torch.float32), tmp_path, reserve=8)


def test_beside_other_adapters_in_a_batch() -> None:
    """First pass, second and later ones, with and without gradients."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 3e-2)):
        model = mlp(dtype=dtype)
        for seed, name in enumerate("abc"):
            settings = {"use_dora": name != "b", "lora_bias": name == "c", "r": 2 + seed}
            config = deltaw.LoraConfig(lora_alpha=5, **settings)
            deltaw.attach(model, config, name, trainable=False)
            for part in model.modules():
                if isinstance(part, nn.ModuleDict) and name in part:
                    for p in part[name].parameters():
                        p.data += 0.2 * torch.randn(p.shape, dtype=p.dtype)
        x = torch.randn(6, 3, 7).to(dtype)
        for names in (["a", "b", "c", None, "a", "c"], ["a", "a", "b", "b", "c", "c"]):
            with torch.no_grad():
                parts = []
                for row, name in zip(x.split(1), names, strict=True):
                    deltaw.activate(model, name)
                    parts.append(model(row))
                expected = torch.cat(parts)
            with deltaw.rows(model, names):
                outputs = [model(x)]
                with torch.no_grad():
                    outputs += [model(x) for _ in range(3)]
            for output in outputs:
                torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def peft_twin(model: nn.Module, folder: Path, **settings: object) -> nn.Module:
    """The same adapter on the same base under PEFT, in training."""
    deltaw.save(model, folder)
    base = copy.deepcopy(model)
    deltaw.detach(base)
    return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).train()


@pytest.mark.filterwarnings("ignore")
def test_output_and_gradients_are_pefts(tmp_path: Path) -> None:
    model = trained(mlp(dtype=torch.float32)).train()
    theirs = peft_twin(model, tmp_path)
    x = inputs().float()
    ours = gradients(model, model(x))
    others = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    output = theirs(x)
    named = dict(
        zip(others, torch.autograd.grad(output.square().sum(), list(others.values())), strict=True)
    )
    torch.testing.assert_close(ours[0], output.detach(), rtol=1e-6, atol=1e-6)
    held = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(held) == len(named) == 6
    for name, gradient in zip(held, ours[1:], strict=True):
        path, tensor = name.split(".")[0], name.split(".")[-1]
        (found,) = (g for n, g in named.items() if f".{path}." in f".{n}" and tensor in n)
        torch.testing.assert_close(gradient, found, rtol=2e-5, atol=1e-6)


def test_dropout_is_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same masks, where DoRA's ΔW acts on the dropped input and W on the whole one."""
    model = trained(mlp(dtype=torch.float32), lora_dropout=0.25).train()
    theirs = peft_twin(model, tmp_path).train()
    keep = {width: (torch.arange(4 * width).reshape(4, width) % 3 > 0).byte() for width in (7, 5)}
    monkeypatch.setattr(shared, "keep_mask", lambda x, p: keep[x.shape[1]])
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.forward = lambda x: x * keep[x.shape[1]] / 0.75
    x = inputs().float()
    output, expected = model(x), theirs(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output, model.eval()(x), rtol=1e-2)
    of_magnitudes = [
        torch.autograd.grad(
            y.square().sum(), [p for n, p in m.named_parameters() if "magnitude" in n]
        )
        for m, y in ((model, output), (theirs, expected))
    ]
    for ours, other in zip(*of_magnitudes, strict=True):
        torch.testing.assert_close(ours, other, rtol=2e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Record the new tensors of a shape that operations give, views aside."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = {shape, shape[::-1]}
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and not func.is_view
        if made and tuple(result.shape) in self.shapes:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_step_forms_nothing_of_the_weights_size(dropout: float) -> None:
    model = trained(mlp(dtype=torch.float32), lora_dropout=dropout).train()
    for shape in ((5, 7), (9, 5)):
        with Largest(shape) as seen:
            model(inputs().float()).square().sum().backward()
        assert not seen.found
    with Largest((5, 7)) as seen:
        deltas(model[:1])
    assert seen.found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["magnitude", "flag", "shape"])
def test_files_that_do_not_agree(tmp_path: Path, loss: str) -> None:
    deltaw.save(trained(mlp(dtype=torch.float32)), tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    (name,) = (key for key in tensors if "magnitude" in key and ".0." in key)
    if loss == "magnitude":
        del tensors[name]
    elif loss == "flag":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": False}))
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, file)
    with pytest.raises(FormatError, match="magnitude") as caught:
        deltaw.load(mlp(dtype=torch.float32), tmp_path)
    assert "'0'" in str(caught.value)


def test_summary_names_and_repr() -> None:
    model = trained(mlp())
    adapter = model[0].adapter.default.weight
    assert isinstance(adapter, DoraAdapter) and "r=3" in repr(adapter)
    assert "lora_magnitude_vector" in dict(adapter.named_parameters())


def test_a_magnitude_stays_in_full_precision_beside_lean_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)).to(torch.bfloat16)
    for number in range(2):
        model = copy.deepcopy(plain)
        deltaw.attach(model, deltaw.LoraConfig(r=4, use_dora=True, target_modules=["0", "1"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    nn.init.normal_(parameter, std=0.01)
                elif name.endswith("lora_magnitude_vector"):
                    parameter.mul_(1 + 0.002 * torch.randn(parameter.shape))
        deltaw.save(model, tmp_path / str(number))
    full, lean = copy.deepcopy(plain), copy.deepcopy(plain)
    deltaw.load(full, tmp_path / "1")
    for number in range(2):
        deltaw.load(lean, tmp_path / str(number), dtype=torch.bfloat16, swap=bool(number))
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in lean.named_parameters()}
    assert dtypes["lora_A"] == dtypes["lora_B"] == torch.bfloat16
    assert dtypes["lora_magnitude_vector"] == torch.float32
    for a, b in zip(deltas(full), deltas(lean), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def deltas(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            layer.parts("default")["weight"].delta(layer.matrix("weight").float())
            for layer in model
        ]


def test_what_peft_does_not_load_is_said_before_it_is_trained() -> None:
    config = deltaw.LoraConfig(r=2, use_dora=True, lora_bias=True)
    [line] = deltaw.plan(mlp(), config).warnings
    assert line == "use_dora with lora_bias: PEFT refuses the file, which deltaw alone loads"
    assert not deltaw.plan(mlp(), deltaw.LoraConfig(r=2, use_dora=True)).warnings
