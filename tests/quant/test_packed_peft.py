"""PEFT's QLoRA on the same packed weights: the same outputs and the same gradients of A and B."""

import copy

import pytest
import torch
from conformance.peft_pair import peft, quiet
from quant.packed_models import batch, net, over
from torch import Tensor, nn

import deltaw

FLAGS = {"nf4": "is_loaded_in_4bit", "fp4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
STEP = 2e-3
"""What it makes where LLM.int8() rounds an input to the next of its 255 steps."""
SETTINGS = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}


def pair(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Copies of one packed model under PEFT and under deltaw, with the same A and B."""
    base = net(kind, dtype)
    theirs = copy.deepcopy(base)
    if kind in FLAGS:
        setattr(theirs, FLAGS[kind], True)
    with quiet():
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**SETTINGS))
    deltaw.attach(base, deltaw.LoraConfig(**SETTINGS))
    generator = torch.Generator().manual_seed(4)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                own[deltaws(name)].copy_(parameter)
    return theirs, base


def deltaws(name: str) -> str:
    """`base_model.model.up.lora_A.default.weight` as deltaw calls it."""
    *_, layer, factor, adapter, _ = name.split(".")
    return f"{layer}.adapter.{adapter}.weight.{factor}"


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@over("nf4", "fp4", "int8", "torchao-int8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients(kind: str, dtype: torch.dtype, training: bool) -> None:
    theirs, ours = pair(kind, dtype)
    tolerance = max(TOLERANCE[dtype], STEP * (kind == "int8" and not training))
    outputs = []
    for model in (theirs, ours):
        x = batch(dtype).requires_grad_()
        with quiet():
            y = model.train(training)(x)
        (y.float() * torch.linspace(-1, 2, 5)).square().sum().backward()
        outputs.append((y.detach(), x.grad))
    for expected, found in zip(*outputs, strict=True):
        close(found, expected, tolerance)
    own = dict(ours.named_parameters())
    compared = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            close(own[deltaws(name)].grad, parameter.grad, tolerance)
            compared += 1
    assert compared == 4
    with torch.no_grad(), quiet():
        close(ours(batch(dtype)), theirs(batch(dtype)), tolerance)
