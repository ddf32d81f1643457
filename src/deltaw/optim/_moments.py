"""The two moments of Adam for one tensor, kept in its own dtype or in 8 bits."""

import functools
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""How many entries of an 8-bit moment share one scale."""


def update(
    state: dict[str, Any], grad: Tensor, betas: tuple[float, float], eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """Take `grad` into both moments; return m and sqrt(v / (1 - β₂ᵗ)) + ε, in its shape.

    m <- β₁ m + (1 - β₁) g, v <- β₂ v + (1 - β₂) g². `state` counts this step, the t-th, already.
    """
    beta1, beta2 = betas
    grad = grad.float() if bits == 8 else grad
    m = _read(state, "exp_avg", grad, bits).lerp_(grad, 1 - beta1)
    v = _read(state, "exp_avg_sq", grad, bits).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if bits == 8:
        _pack(state, "exp_avg", m)
        _pack(state, "exp_avg_sq", v)
    return m, (v.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(eps)


def require_bits(bits: int) -> None:
    """Raise `ConfigError` if moments of so many bits need a package that is not installed.

    What is made once and kept is made here, where no step is rehearsed on tensors without values.
    """
    if bits == 8:
        _packing()
        for name in MOMENTS:
            _code(name, torch.device("cpu"))


def _read(state: dict[str, Any], name: str, like: Tensor, bits: int) -> Tensor:
    """Return a moment to be changed in place; it starts at zero."""
    if name not in state:
        moment = torch.zeros_like(like)
        if bits != 8:
            state[name] = moment
        return moment
    if bits != 8:
        held: Tensor = state[name]
        return held
    unpacked: Tensor = _packing().dequantize_blockwise(
        state[name],
        absmax=state[f"{name}_absmax"],
        code=_code(name, like.device),
        blocksize=BLOCK,
    )
    return unpacked


def _pack(state: dict[str, Any], name: str, moment: Tensor) -> None:
    """Keep a moment as one byte an entry and the largest of each block.

    Source: blockwise dynamic quantisation, arXiv 2110.02861.
    """
    codes, scales = _packing().quantize_blockwise(
        moment.contiguous(), code=_code(name, moment.device), blocksize=BLOCK
    )
    state[name], state[f"{name}_absmax"] = codes, scales.absmax


@functools.cache
def _code(name: str, device: torch.device) -> Tensor:
    """Return the 256 values of a byte on a device; the second moment has no sign."""
    code: Tensor = _packing().create_dynamic_map(signed=name == "exp_avg")
    return code.to(device)


@functools.cache
def _packing() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            f"optim_bits=8 needs bitsandbytes, which cannot be imported: {error}\n"
            "Fix: pip install 'deltaw[bnb]', or leave optim_bits at 32."
        ) from error
    return bitsandbytes.functional
