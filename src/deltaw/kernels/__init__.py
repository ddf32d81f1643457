"""Fast twins of what `layers/` computes in plain steps: one file per way of applying a weight.

A kernel returns the values and the gradients of the plain steps, up to rounding, wherever `why_not`
gives no reason against it. Nothing of deltaw is imported here.
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""A fake tensor stands for a plain one: what is rehearsed on it takes the way of the real run."""
HALF = (torch.bfloat16, torch.float16)


def why_not(*tensors: Tensor | None) -> list[str]:
    """Return the reasons why no kernel applies to these tensors now."""
    reasons = []
    if torch.compiler.is_compiling():
        reasons.append("the compiler fuses the plain steps itself")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        reasons.append("a function transform or forward-mode derivative is active")
    if torch._C._get_tracing_state() is not None:
        reasons.append("the forward pass is being traced")
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN:
            reasons.append(f"{type(tensor).__name__} is a tensor of a kind of its own")
    return reasons


def factor_dtype(x: Tensor, few: int = 16) -> torch.dtype:
    """Return the dtype in which factors multiply `x`, without gradients.

    That of `x`; but float32 for few rows in half precision on a CPU, where half precision is
    emulated or repacked for each product and float32 factors need no cast
    (`benchmarks/products.py`).
    """
    dtype = x.dtype
    narrow = dtype in HALF and x.numel() <= few * x.shape[-1] and x.device.type == "cpu"
    return torch.float32 if narrow else dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear map of `x` is computed: autocast's or its own."""
    dtype = x.dtype
    if not torch._C._is_any_autocast_enabled() or dtype == torch.float64 or x.is_meta:
        return dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
