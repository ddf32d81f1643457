"""What an adapter is made of and how far it moves each layer, without forming any ΔW.

    ‖BA‖_F² = ⟨BᵀB, AAᵀ⟩

costs O(r² (in + out)) instead of O(in out).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltaw.errors import FormatError, printable, raise_all
from deltaw.fingerprint import adapted_weights, fingerprint
from deltaw.fitting import fit, named
from deltaw.layers import geometry_of
from deltaw.layers.experts import Experts
from deltaw.layers.linear import slice_slot
from deltaw.planning import base_modules, look
from deltaw.state import IDS, ROWS, LayerState, State, plain


@dataclass(frozen=True)
class LayerReport:
    """One slot of one layer; `relative` is ‖ΔW‖/‖W‖ where the base is at hand.

    Without it `norm` is that of s B A for DoRA, whose ΔW takes the base to tell.
    """

    path: str
    kind: str
    r: int
    scale: float
    norm: float
    relative: float | None
    broken: bool
    """Whether its tensors hold NaN or Inf."""

    @property
    def dead(self) -> bool:
        """Whether the slot's ΔW is zero: it was never trained, or has no effect."""
        return self.norm == 0 and not self.broken


@dataclass(frozen=True)
class CopyReport:
    """One parameter trained in full; `broken` tells whether it holds NaN or Inf."""

    path: str
    parameters: int
    broken: bool


@dataclass(frozen=True)
class Report:
    """An adapter's layers and the parameters it trained as full copies."""

    layers: tuple[LayerReport, ...]
    copies: tuple[CopyReport, ...]
    parameters: int

    @property
    def dead(self) -> list[str]:
        """Paths of layers whose ΔW is zero."""
        return [layer.path for layer in self.layers if layer.dead]

    @property
    def broken(self) -> list[str]:
        """Paths of layers and full copies that hold NaN or Inf."""
        return [part.path for part in (*self.layers, *self.copies) if part.broken]


def report(state: State, base: nn.Module | None = None) -> Report:
    """Return ranks, scales and norms of all layers of an adapter.

    Raises:
        FormatError: if it adapts parameters on their own, which a file tells apart with the base
            alone, and there is none.
    """
    modules = base_modules(base) if base is not None else {}
    if base is not None:
        state = named(modules, state)
    elif state.config.target_parameters:
        raise FormatError(
            "Factors of target_parameters are told apart by the model alone.\n"
            "Fix: name the model that the adapter was trained on with --model."
        )
    layers, copies, count = [], [], 0
    for path, whole in state.layers.items():
        trained = {n: t for n, t in whole.tensors.items() if not n.endswith(f".{IDS}")}
        count += sum(t.numel() for n, t in trained.items() if ".start_" not in n)
        layer = plain(whole)
        for name, tensor in layer.tensors.items():
            if name.endswith((".trained", f".{ROWS}")):
                own = f"{path}.{name.rpartition('.')[0]}".lstrip(".")
                copies.append(CopyReport(own, tensor.numel(), not _finite(tensor)))
            elif name.endswith(".lora_A"):
                slot = name.removesuffix(".lora_A")
                W = _matrix(modules[path], layer, slot) if path in modules else None
                layers.append(_layer(path, slot, layer, W))
    layers.sort(key=lambda layer: in_order(layer.path))
    return Report(tuple(layers), tuple(copies), count)


def require_fitting(state: State, base: nn.Module, name: str) -> None:
    """Raise `FormatError` if the low-rank layers do not fit `base`, or were trained on another."""
    low_rank = {path: layer for path, layer in state.layers.items() if layer.kind != "module"}
    fix = "name the model that the adapter was trained on with --model, or leave --model out."
    _, problems = fit(base_modules(base), replace(state, layers=low_rank))
    raise_all(FormatError, f"The adapter does not fit {printable(name, 300)}:", problems, fix)
    told = named(base_modules(base), replace(state, layers=low_rank)).layers
    ours = fingerprint(base, adapted_weights(told))
    if ours is None or state.base is None or ours.split(":")[0] != state.base.split(":")[0]:
        return
    if ours != state.base:
        raise FormatError(
            f"The adapter was trained on other weights than those of {printable(name, 300)}.\n"
            f"Fix: {fix}"
        )


def delta_norm(layer: LayerState, slot: str) -> float:
    """Return ‖scale B A‖_F of a slot, in float64, from the two r x r Gram matrices."""
    A = layer.tensors[f"{slot}.lora_A"].to(torch.float64)
    B = layer.tensors[f"{slot}.lora_B"].to(torch.float64)
    if layer.kind == "experts":
        return layer.scale_of(slot) * math.sqrt(_square(A, B))
    A = A.flatten(1)
    groups = A.shape[0] // B.shape[1]  # over 1 where A spans all groups of a convolution
    parts = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return layer.scale * math.sqrt(sum(_square(a, b) for a, b in parts))


def _dora_norm(layer: LayerState, slot: str, W: Tensor) -> float:
    """Return ‖m V / ‖V‖ - W‖_F for V = W + scale B A, where W is and in its dtype."""
    A = layer.tensors[f"{slot}.lora_A"].to(W).flatten(1)
    B = layer.tensors[f"{slot}.lora_B"].to(W).flatten(1)
    m = layer.tensors[f"{slot}.lora_magnitude_vector"].to(W)
    V = W + layer.scale * B @ A
    return float((m.unsqueeze(1) * V / V.norm(dim=1, keepdim=True) - W).norm())


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def in_order(path: str) -> list[tuple[int, str]]:
    """Sort layer 10 after layer 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


def _square(A: Tensor, B: Tensor) -> float:
    square = ((B.mT @ B) * (A @ A.mT)).sum().item()
    return square if math.isnan(square) else max(0.0, square)


def _matrix(module: nn.Module, layer: LayerState, slot: str) -> Tensor | None:
    """Return the frozen weight of a slot as (out, in), in float64."""
    geometry = Experts if layer.kind == Experts.kind else geometry_of(module, layer)
    if geometry is None:
        return None
    if slot.startswith("slice_"):
        slot = slice_slot(int(slot.removeprefix("slice_")), len(layer.enabled))
    return look(module, geometry).matrix(slot).detach().to(torch.float64)


def _layer(path: str, slot: str, layer: LayerState, W: Tensor | None) -> LayerReport:
    norm = delta_norm(layer, slot)
    relative = None
    if W is not None:
        if f"{slot}.lora_magnitude_vector" in layer.tensors:
            norm = _dora_norm(layer, slot, W)
        relative = norm / max(W.norm().item(), 1e-30)
    name = path if slot == "weight" else f"{path}[{slot}]"
    rank = layer.tensors[f"{slot}.lora_A"].shape[-2 if layer.kind == "experts" else 0]
    own = [tensor for part, tensor in layer.tensors.items() if part.startswith(f"{slot}.lora_")]
    broken = not all(map(_finite, own))
    return LayerReport(name, layer.kind, rank, layer.scale_of(slot), norm, relative, broken)
