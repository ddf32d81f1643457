"""Blocks of a transformer that keep less for the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deltaw.errors import TargetError, raise_all
from deltaw.kernels import why_not
from deltaw.kernels.gated import gated
from deltaw.kernels.rms_norm import rms_norm
from deltaw.swap import Swapped, origin_of, swap, unswap

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class LeanNorm(Swapped, _Module):
    """Mixin of an RMSNorm with a frozen weight."""

    remakes: bool

    @staticmethod
    def computes(module: Any) -> bool:
        """Tell whether the module is such a norm, by its parts and by its values."""
        weight, eps = getattr(module, "weight", None), _eps(module)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
            return False
        x = _probe(weight, len(weight))
        return list(module._parameters) == ["weight"] and _same(
            module, x, lambda: rms_norm(x, weight, eps)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of the input."""
        weight, eps = cast(Tensor, self.weight), _eps(self)
        alike = hidden_states.dtype == weight.dtype and not weight.requires_grad
        if not alike or eps is None or not _lean(hidden_states, weight):
            output: Tensor = self.origin.forward(self, hidden_states)
            return output
        return rms_norm(hidden_states, weight, eps, self.remakes)


class LeanMLP(Swapped, _Module):
    """Mixin of a gated MLP: down(φ(gate(x)) ∘ up(x))."""

    remakes: bool

    @staticmethod
    def computes(module: Any) -> bool:
        """Tell whether the module is such an MLP, by its parts and by its values."""
        names = ("gate_proj", "up_proj", "down_proj", "act_fn")
        if not all(callable(getattr(module, name, None)) for name in names):
            return False
        first = next(module.gate_proj.parameters(), None)
        if first is None or list(module._parameters):
            return False
        if isinstance(module.act_fn, nn.Module) and any(True for _ in module.act_fn.parameters()):
            return False
        x = _probe(first, getattr(module.gate_proj, "in_features", 0))
        return _same(module, x, lambda: _mlp(module, x, False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the MLP."""
        if not _lean(x):
            output: Tensor = self.origin.forward(self, x)
            return output
        return _mlp(self, x, self.remakes)


def _mlp(module: Any, x: Tensor, again: bool) -> Tensor:
    h = gated(module.gate_proj(x), module.up_proj(x), module.act_fn, again)
    output: Tensor = module.down_proj(h)
    return output


@dataclass(frozen=True)
class Lean:
    """What `fuse_blocks` did; `remove()` gives the modules their own forward back."""

    norms: tuple[nn.Module, ...]
    mlps: tuple[nn.Module, ...]

    def __str__(self) -> str:
        return f"{len(self.norms)} norms and {len(self.mlps)} gated MLPs keep less"

    def remove(self) -> None:
        """Undo `fuse_blocks`."""
        for module in (*self.norms, *self.mlps):
            if isinstance(module, (LeanNorm, LeanMLP)):
                del module.remakes
                unswap(module)


@torch.no_grad()
def fuse_blocks(model: nn.Module, *, remake: bool = False) -> Lean:
    """Keep less of each block for the backward pass, from now on.

    RMSNorms `y = w ∘ x n` keep x in its own dtype instead of float32 and gated MLPs
    `down(φ(g) ∘ u)` keep g and u alone. A module is taken only where its output for a random input
    is that of the equation bit for bit; outputs stay what they were and gradients agree up to
    rounding.

    Args:
        model: any model; a norm whose weight is trained is left to itself.
        remake: let adapters that read the output of either make it again in the backward pass
            instead of keeping it, which takes less memory and more time.

    Raises:
        TargetError: if the model has no such module, or they are fused already, or something else
            replaced their forward.
    """
    if any(isinstance(module, (LeanNorm, LeanMLP)) for module in model.modules()):
        raise TargetError(f"The blocks of this {type(model).__name__} are fused already.")
    found: dict[type[LeanNorm | LeanMLP], list[nn.Module]] = {LeanNorm: [], LeanMLP: []}
    for module in model.modules():
        for mixin, taken in found.items():
            if not isinstance(module, Swapped) and mixin.computes(module):
                taken.append(module)
    lean = Lean(tuple(found[LeanNorm]), tuple(found[LeanMLP]))
    if not lean.norms and not lean.mlps:
        raise TargetError(
            f"{type(model).__name__} has no RMSNorm and no gated MLP that could keep less."
        )
    hidden = [
        path
        for path, m in model.named_modules()
        if m in (*lean.norms, *lean.mlps) and "forward" in vars(m)
    ]
    raise_all(
        TargetError,
        "An instance-level `forward` hides the class of these modules:",
        hidden,
        "call fuse_blocks before whatever replaced it, such as accelerate's hooks.",
    )
    for mixin, taken in found.items():
        for module in taken:
            swap(module, mixin)
            cast(Any, module).remakes = remake
    return lean


def _lean(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and not why_not(*tensors)


def _eps(module: Any) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _probe(like: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, width, generator=generator, device="cpu").to(like.device, like.dtype)


def _same(module: nn.Module, x: Tensor, other: Callable[[], Tensor]) -> bool:
    """Tell whether the module's own output is the other one, bit for bit."""
    if x.is_meta or not x.is_floating_point():
        return False
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices):
            mine = origin_of(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError):
        return False
    with torch.random.fork_rng(devices):
        return isinstance(mine, Tensor) and torch.equal(mine, other())
