"""Adapters drawn at random, and their ΔW written out by index in float64."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.state import LayerState, State

KINDS = ("linear", "conv1d", "embedding", "conv", "grouped", "spanning", "factored", "fused")
BIASED = ("linear", "conv1d", "conv", "grouped", "spanning", "fused")


def layer(
    kind: str,
    r: int,
    scale: float = 1.0,
    *,
    enabled: tuple[bool, ...] = (True, False, True),
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> LayerState:
    """One layer of any kind: always the same (out, in), whatever rank, scale and seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "fused":
        tensors = {}
        for index in (i for i, on in enumerate(enabled) if on):
            tensors[f"slice_{index}.lora_A"] = draw(r, 5)
            tensors[f"slice_{index}.lora_B"] = draw(4, r)
            if bias:
                tensors[f"slice_{index}.lora_B_bias"] = draw(4)
        return LayerState(kind, tensors, scale, enabled)
    shapes = {
        "conv": ((r, 3, 2, 1), (8, r)),
        "grouped": ((r, 3, 2, 1), (8, r)),
        "spanning": ((2 * r, 6, 2, 1), (8, r)),
        "factored": ((2 * r, 10), (8, 2 * r)),
    }
    A, B = shapes.get(kind, ((r, 7), (6, r)))
    tensors = {"weight.lora_A": draw(*A), "weight.lora_B": draw(*B)}
    if bias:
        tensors["weight.lora_B_bias"] = draw(B[0])
    groups = 2 if kind in ("grouped", "spanning") else 1
    name = "conv" if kind in ("grouped", "spanning", "factored") else kind
    return LayerState(name, tensors, scale, groups=groups, factored=kind == "factored")


def state(layers: dict[str, LayerState], base: str | None = None, **settings: object) -> State:
    return State(LoraConfig(**settings), layers, base)


def delta(own: LayerState) -> Tensor:
    """ΔW (out, columns of A) row by row, zero in slices that are not adapted."""
    if own.kind == "fused":
        rows = []
        for index, on in enumerate(own.enabled):
            A = own.tensors.get(f"slice_{index}.lora_A", torch.zeros(1, 5)).double()
            B = own.tensors.get(f"slice_{index}.lora_B", torch.zeros(4, 1)).double()
            rows.append(B @ A * (own.scale if on else 0))
        return torch.cat(rows)
    A, B = own.tensors["weight.lora_A"].double(), own.tensors["weight.lora_B"].double()
    out, width = B.shape
    groups = len(A) // width
    rows = []
    for row in range(out):
        first = row * groups // out * width
        kernels = A[first : first + width].flatten(1)
        rows.append(sum(own.scale * B[row, j] * kernels[j] for j in range(width)))
    return torch.stack(rows)


def shift(own: LayerState) -> Tensor:
    """What is added to the bias, zero where nothing is."""
    if own.kind == "fused":
        parts = [own.tensors.get(f"slice_{i}.lora_B_bias") for i in range(len(own.enabled))]
        return torch.cat([torch.zeros(4) if p is None else p.double() for p in parts]) * own.scale
    bias = own.tensors.get("weight.lora_B_bias")
    return torch.zeros(len(delta(own))) if bias is None else bias.double() * own.scale


def weighted(states: list[State], weights: list[float], path: str, of=delta) -> Tensor:
    """Σ wᵢ ΔWᵢ of one layer."""
    held = [(w, s.layers[path]) for s, w in zip(states, weights, strict=True) if path in s.layers]
    return sum(w * of(own).double() for w, own in held)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    size = max(1.0, float(b.abs().max()))
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * size)


@st.composite
def several(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> tuple[list[State], list[float]]:
    """Adapters of one base with unequal ranks, alphas and layers, and a weight for each."""
    paths = {f"h.{n}": draw(st.sampled_from(kinds)) for n in range(draw(st.integers(1, 3)))}
    states, weights = [], []
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.lists(st.sampled_from(sorted(paths)), min_size=1, unique=True))
        root = draw(st.booleans())
        layers = {}
        for path in own:
            r, alpha = draw(st.integers(1, 4)), draw(st.integers(1, 16))
            kind = paths[path]
            layers[path] = layer(
                kind,
                r,
                alpha / (r**0.5 if root else r),
                enabled=draw(st.sampled_from([(True, False, True), (False, True, True)])),
                bias=kind in BIASED and draw(st.booleans()),
                seed=draw(st.integers(0, 999)),
            )
        states.append(state(layers, use_rslora=root))
        weights.append(draw(st.sampled_from([1.0, -1.0, 0.3, 2.5, 0.0])))
    return states, weights
