"""Packing layers on a device of their own, one after another."""

import pytest
import torch
from quant.packed_models import KINDS, Net, net, over, torchao
from torch import nn

import deltaw
from deltaw.errors import TargetError
from deltaw.marks import _kind
from deltaw.quant import kinds


@over(*KINDS)
def test_each_layer_is_moved_and_packed_before_the_next(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a device holds one full layer beside what is packed."""
    model, done = net(), []
    storage = kinds()[kind]
    move, pack = nn.Linear.to, type(storage).pack

    def moved(layer: nn.Linear, device: str) -> nn.Linear:
        done.append(("to", layer.out_features, device))
        return move(layer, device)

    def packed(self: object, layer: nn.Linear, *how: object) -> None:
        done.append(("pack", layer.out_features))
        pack(self, layer, *how)

    monkeypatch.setattr(nn.Linear, "to", moved)
    monkeypatch.setattr(type(storage), "pack", packed)
    deltaw.quantize(model, kind, exclude_modules=["last"], device="cpu")
    assert done == [("to", 128, "cpu"), ("pack", 128), ("to", 32, "cpu"), ("pack", 32)]


@torchao
@pytest.mark.parametrize(
    ("device", "dtype", "capability", "refused"),
    [
        ("cuda", torch.bfloat16, (8, 0), None),
        ("cuda", torch.bfloat16, (7, 5), "up: the int4 kernel takes a GPU of compute capability"),
        ("cuda", torch.float32, (9, 0), "up: it is in torch.float32, and the int4 kernel of a GPU"),
        ("xpu", torch.bfloat16, (9, 0), "up: torchao has no int4 kernel for the device xpu"),
    ],
)
def test_a_device_is_asked_before_weights_are_packed_for_it(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[nn.Module] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(nn.Linear, "to", lambda self, _: moved.append(self))
    model = Net().to(dtype)
    if refused is None:
        deltaw.quantize(model, "torchao-int4", exclude_modules=["last"], device=device)
        assert moved == [model.up, model.down]
        return
    with pytest.raises(TargetError, match=refused):
        deltaw.quantize(model, "torchao-int4", exclude_modules=["last"], device=device)
    assert not moved and type(model.up.weight) is nn.Parameter


def test_packed_bits_of_another_device_are_not_compared() -> None:
    assert _kind(torch.empty(2, dtype=torch.uint8)) == "uint8"
    assert _kind(torch.empty(2, dtype=torch.uint8, device="meta")) == "uint8 on meta"
    assert _kind(torch.empty(2, dtype=torch.bfloat16, device="meta")) == "bfloat16"
