"""Small models to pack, and what a packed weight consists of."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.quant import storage_of
from deltaw.storage import inner

KINDS = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4")
BNB = ("nf4", "fp4", "int8")

bnb = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="package absent: bitsandbytes"
)
torchao = pytest.mark.skipif(
    not importlib.util.find_spec("torchao"), reason="package absent: torchao"
)


def over(*kinds: str) -> pytest.MarkDecorator:
    """Parametrise `kind`, skipping what needs an absent package."""
    found = [pytest.param(k, marks=torchao if k.startswith("torchao") else bnb) for k in kinds]
    return pytest.mark.parametrize("kind", found)


class Net(nn.Module):
    """Two linear layers, a norm between them, and an output layer that its name says nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.down = nn.Linear(128, 32, bias=False)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.down(torch.tanh(self.norm(self.up(x))))))


def net(kind: str | None = None, dtype: torch.dtype = torch.float32, **options: object) -> Net:
    """The model, packed but for its last layer."""
    torch.manual_seed(0)
    model = Net().to(dtype).eval()
    if kind:
        deltaw.quantize(model, kind, exclude_modules=["last"], **options)
    return model


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """An input."""
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapt(model: nn.Module, **options: object) -> nn.Module:
    """An adapter on the packed layers whose B is not zero."""
    settings = deltaw.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], **options)
    deltaw.attach(model, settings, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def dense(layer: nn.Module) -> Tensor:
    """The unpacked weight."""
    storage = storage_of(layer)
    assert storage is not None
    return storage.read(layer)


def size(model: nn.Module) -> int:
    """The bytes of all that a model's `state_dict` holds, those of packed weights' parts."""
    return sum(part.nbytes for value in model.state_dict().values() for part in inner(value))


ABSORBED = {"r": 8, "lora_alpha": 5, "target_modules": ["up", "down"]}


def absorbed(kind: str | bool, init: str = "pissa", model: nn.Module | None = None) -> nn.Module:
    """An adapter whose start was taken out of the weights."""
    model = net() if model is None else model
    config = deltaw.LoraConfig(**ABSORBED, init_lora_weights=init)
    deltaw.attach(model, config, generator=torch.Generator().manual_seed(0), absorb=kind)
    return model
