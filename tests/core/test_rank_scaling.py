"""rsLoRA's claim: at alpha / sqrt(r) neither ΔW's outputs nor its gradients change size with r.

Source: arXiv 2312.03732, theorem 3.2, of A random and B zero after steps of plain gradient descent
at a rate that does not depend on r, and figure 3, the norm of the factors' gradients. At alpha / r
outputs shrink as 1 / r and gradients as 1 / sqrt(r).
"""

import statistics

import pytest
import torch
from torch import nn

import deltaw

RANKS = (4, 16, 64, 256, 512)
STEPS, RATE, SEEDS = 5, 1e-3, 12


def sizes(r: int, seed: int, *, rslora: bool) -> tuple[float, float]:
    """The norms of ΔW x and of the gradients of A and B, after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 640, bias=False))
    inputs, gradient = torch.randn(1, 512), torch.randn(1, 640) / 640**0.5
    base = model(inputs).detach()
    deltaw.attach(
        model, deltaw.LoraConfig(r=r, lora_alpha=8.0, target_modules=["0"], use_rslora=rslora)
    )
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        output = model(inputs)
        output.backward(gradient)
        optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in factors if p.grad is not None])
    return (output.detach() - base).norm().item(), norm.item()


def by_rank(*, rslora: bool) -> list[tuple[float, ...]]:
    """Return the outputs' mean sizes of all ranks, and the gradients'."""
    found = [[sizes(r, seed, rslora=rslora) for seed in range(SEEDS)] for r in RANKS]
    means = [[statistics.fmean(size) for size in zip(*some, strict=True)] for some in found]
    return list(zip(*means, strict=True))


def test_sizes_keep_under_rslora() -> None:
    for found in by_rank(rslora=True):
        assert max(found) < 1.35 * min(found), found


def test_sizes_fall_with_the_rank_without_it() -> None:
    outputs, gradients = by_rank(rslora=False)
    for r, output, gradient in zip(RANKS, outputs, gradients, strict=True):
        assert output * r == pytest.approx(outputs[0] * RANKS[0], rel=0.35)
        assert gradient * r**0.5 == pytest.approx(gradients[0] * RANKS[0] ** 0.5, rel=0.35)
