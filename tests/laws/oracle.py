"""What an adapted layer computes, written out by hand in float64.

Nothing here calls deltaw: ΔW is summed from the tensors of a state by index, and each layer is its
defining sum. Everything is differentiable, so that gradients have an oracle too.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


def linear_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (out, in)."""
    return scale * torch.einsum("or,ri->oi", tensors["weight.lora_B"], tensors["weight.lora_A"])


def transposed_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (in, out), as GPT-2's Conv1D stores it."""
    return scale * torch.einsum("or,ri->io", tensors["weight.lora_B"], tensors["weight.lora_A"])


def fused_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (out, in), row by row: row o belongs to slice o // (out / slices)."""
    out, into = layer.weight.shape[::-1]
    if isinstance(layer, nn.Linear):
        out, into = layer.out_features, layer.in_features
    A = {int(n[6]): t for n, t in tensors.items() if n.endswith(".lora_A")}
    B = {int(n[6]): t for n, t in tensors.items() if n.endswith(".lora_B")}
    slices = layer.slices
    size = out // slices
    rows = [
        scale * torch.einsum("r,ri->i", B[o // size][o % size], A[o // size])
        if o // size in A
        else torch.zeros(into, dtype=torch.float64)
        for o in range(size * slices)
    ]
    delta = torch.stack(rows)
    return delta if isinstance(layer, nn.Linear) else delta.T


def experts_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW of every expert, as the module stores it."""
    A, B = tensors["weight.lora_A"], tensors["weight.lora_B"]
    if A.dim() == 2:
        return linear_delta(layer, tensors, scale)
    order = "eio" if hasattr(layer, "is_transposed") else "eoi"
    return scale * torch.einsum(f"eor,eri->{order}", B, A)


def experts(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y_t = W_e x_t + b for expert e = t mod 3 of position t; of one matrix that alone."""
    tokens = x.reshape(-1, x.shape[-1])
    if hasattr(layer, "is_transposed"):
        W = W.mT
    ys = [(W if W.dim() == 2 else W[t % len(W)]) @ token for t, token in enumerate(tokens)]
    y = torch.stack(ys).view(*x.shape[:-1], -1)
    return y if b is None else y + b


def embedding_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (vocabulary, width), zero in the padding row."""
    delta = scale * torch.einsum("wr,rv->vw", tensors["weight.lora_B"], tensors["weight.lora_A"])
    keep = torch.ones(delta.shape[0], 1, dtype=torch.float64)
    if layer.padding_idx is not None:
        keep[layer.padding_idx] = 0
    return delta * keep


def conv_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (out, in/groups, *kernel)."""
    return scale * torch.einsum("or,r...->o...", tensors["weight.lora_B"], tensors["weight.lora_A"])


def spanning_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (out, in, *kernel): output o of group g sees the rows of A that belong to g."""
    A, B = tensors["weight.lora_A"], tensors["weight.lora_B"]
    out, width = B.shape
    rows = []
    for o in range(out):
        first = o // (out // layer.groups) * width
        rows.append(scale * torch.einsum("r,r...->...", B[o], A[first : first + width]))
    return torch.stack(rows)


def factored_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW = B A read in memory order as (out, in/groups, *kernel)."""
    flat = torch.einsum("or,ri->oi", tensors["weight.lora_B"], tensors["weight.lora_A"])
    return scale * flat.reshape(layer.weight.shape)


def dora_delta(layer: nn.Module, W: Tensor, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """m V / ‖V‖ - W for V = W + ΔW; `axis` is that of the outputs, the norm is a constant."""
    V = W + delta
    others = [dim for dim in range(V.dim()) if dim != axis]
    shape = [-1 if dim == axis else 1 for dim in range(V.dim())]
    norm = (V * V).sum(others, keepdim=True).sqrt().detach()
    return magnitude.view(shape) * V / norm - W


def transposed_conv_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensor:
    """ΔW (in, out/groups, *kernel): input c and output o of the same group."""
    A, B = tensors["weight.lora_A"], tensors["weight.lora_B"]
    inputs, outputs = A.shape[1], len(B) // layer.groups
    planes = []
    for c in range(inputs * layer.groups):
        first = c // inputs * outputs
        rows = B[first : first + outputs]
        planes.append(scale * torch.einsum("or,r...->o...", rows, A[:, c % inputs]))
    return torch.stack(planes)


def transposed_conv_dora(layer: nn.Module, W: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's ΔW, where output o of a group has its own part of the inputs of that group."""
    inputs = len(W) // layer.groups
    parts = []
    for group in range(layer.groups):
        rows = slice(group * inputs, (group + 1) * inputs)
        own = magnitude[group * W.shape[1] : (group + 1) * W.shape[1]]
        parts.append(dora_delta(layer, W[rows], delta[rows], own, 1))
    return torch.cat(parts)


def attention_deltas(tensors: Tensors, scale: float) -> dict[str, Tensor]:
    """ΔW of each slot that is adapted, less that of a start which is subtracted."""
    found = {}
    for slot in ("q", "k", "v", "out"):
        for name, sign in (("lora", 1), ("start", -1)):
            if f"{slot}.{name}_A" in tensors:
                A, B = tensors[f"{slot}.{name}_A"], tensors[f"{slot}.{name}_B"]
                found[slot] = found.get(slot, 0) + sign * scale * torch.einsum("or,ri->oi", B, A)
    return found


def attention_delta(layer: nn.Module, tensors: Tensors, scale: float) -> Tensors:
    """ΔW of every weight that holds an adapted slot, by its name."""
    deltas = attention_deltas(tensors, scale)
    found = {"out_proj.weight": deltas["out"]} if "out" in deltas else {}
    inner = {slot: delta for slot, delta in deltas.items() if slot != "out"}
    if layer.in_proj_weight is None:
        return found | {f"{slot}_proj_weight": delta for slot, delta in inner.items()}
    zeros = torch.zeros(layer.embed_dim, layer.embed_dim, dtype=torch.float64)
    whole = torch.cat([inner.get(slot, zeros) for slot in ("q", "k", "v")])
    return found | ({"in_proj_weight": whole} if inner else {})


def attention_weights(layer: nn.Module) -> dict[str, Tensor]:
    """W of each slot."""
    own = {n: p.detach().double() for n, p in layer.named_parameters() if "adapter" not in n}
    names = [f"{slot}_proj_weight" for slot in ("q", "k", "v")]
    parts = own["in_proj_weight"].chunk(3) if "in_proj_weight" in own else [own[n] for n in names]
    return dict(zip(("q", "k", "v", "out"), (*parts, own["out_proj.weight"]), strict=True))


Projected = Callable[[str, Tensor], Tensor]


def attention(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    project: Projected,
    beyond: Sequence[Tensor],
) -> Tensor:
    """Σ_s softmax_s(q_t · k_s / √d) v_s of every head, projected; all is (batch, length, width).

    `beyond` are the learned last key and value, if any.
    """
    q, k, v = (project(slot, x) for slot, x in zip(("q", "k", "v"), inputs, strict=True))
    if beyond:
        k, v = (
            torch.cat((part, own.view(1, 1, -1).expand(len(part), 1, -1)), 1)
            for part, own in zip((k, v), beyond, strict=True)
        )
    if layer.add_zero_attn:
        k, v = (torch.cat((part, torch.zeros_like(part[:, :1])), 1) for part in (k, v))
    d = layer.embed_dim // layer.num_heads
    heads = []
    for h in range(layer.num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = torch.einsum("ntd,nsd->nts", q[..., part], k[..., part]) / math.sqrt(d)
        exponentials = (scores - scores.max(-1, keepdim=True).values).exp()
        weights = exponentials / exponentials.sum(-1, keepdim=True)
        heads.append(torch.einsum("nts,nsd->ntd", weights, v[..., part]))
    return project("out", torch.cat(heads, -1))


def linear(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y_o = Σ_i W_oi x_i + b_o."""
    y = torch.einsum("oi,...i->...o", W, x)
    return y if b is None else y + b


def transposed(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y_o = Σ_i W_io x_i + b_o."""
    return linear(layer, x, W.T, b)


def embedding(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y = scale · Σ_v [x = v] W_v."""
    onehot = (x.unsqueeze(-1) == torch.arange(W.shape[0])).double()
    return torch.einsum("...v,vw->...w", onehot, W) * float(getattr(layer, "embed_scale", 1.0))


def convolution(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y[o, p] = Σ_c,k W[o, c, k] x[c of o's group, p stride + k dilation - padding] + b[o]."""
    return _convolve(layer, x, W, b, layer.groups)


def transposed_convolution(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y[o, p] = Σ x[c, q] W[c, o, k] over q stride + k dilation - padding = p, plus b[o]."""
    kernel, groups = W.shape[2:], layer.groups
    axes = list(zip(x.shape[2:], layer.stride, layer.dilation, kernel, strict=True))
    sizes = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in axes]
    sizes = [size + more for size, more in zip(sizes, layer.output_padding, strict=True)]
    y = x.new_zeros(len(x), W.shape[1] * groups, *sizes)
    parts = x.reshape(len(x), groups, -1, math.prod(x.shape[2:]))
    for offset in itertools.product(*map(range, kernel)):
        weight = W[(slice(None), slice(None), *offset)].reshape(groups, -1, W.shape[1])
        found = torch.einsum("ngcp,gco->ngop", parts, weight).reshape(*y.shape[:2], *x.shape[2:])
        for axis, (n, s, d, _) in enumerate(axes):
            places = torch.arange(n) * s + offset[axis] * d
            wide = found.new_zeros(*found.shape[: axis + 2], sizes[axis], *found.shape[axis + 3 :])
            found = wide.index_copy(axis + 2, places, found)
        y = y + found
    for axis, p in enumerate(layer.padding):
        y = y.narrow(axis + 2, p, y.shape[axis + 2] - 2 * p)
    return y if b is None else y + b.view(-1, *[1] * len(kernel))


def full_convolution(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """The same over the channels of all groups."""
    return _convolve(layer, x, W, b, 1)


def spread(layer: nn.Module, W: Tensor) -> Tensor:
    """W (out, in/groups, *kernel) as (out, in, *kernel), zero between groups."""
    full = W.new_zeros(W.shape[0], W.shape[1] * layer.groups, *W.shape[2:])
    for o, c in itertools.product(range(W.shape[0]), range(W.shape[1])):
        full[o, o // (W.shape[0] // layer.groups) * W.shape[1] + c] = W[o, c]
    return full


def spread_rows(layer: nn.Module, B: Tensor) -> Tensor:
    """B (out, R/groups) as (out, R), zero off the groups."""
    out, width = B.shape
    full = B.new_zeros(out, width * layer.groups)
    for o in range(out):
        first = o // (out // layer.groups) * width
        full[o, first : first + width] = B[o]
    return full


def _convolve(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, groups: int) -> Tensor:
    kernel = W.shape[2:]
    for axis, k in enumerate(kernel):
        before, after = _padding(layer, axis, k)
        x = _pad(x, axis + 2, before, after, layer.padding_mode)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel, strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    y = x.new_zeros(x.shape[0], W.shape[0], *sizes)
    for offset in itertools.product(*map(range, kernel)):
        window = x
        for axis, (o, n) in enumerate(zip(offset, sizes, strict=True)):
            start = o * layer.dilation[axis]
            window = window.index_select(axis + 2, torch.arange(n) * layer.stride[axis] + start)
        parts = window.reshape(x.shape[0], groups, -1, math.prod(sizes))
        weight = W[(slice(None), slice(None), *offset)].reshape(groups, -1, W.shape[1])
        y = y + torch.einsum("ngcp,goc->ngop", parts, weight).reshape(y.shape)
    return y if b is None else y + b.view(-1, *[1] * len(kernel))


def _padding(layer: nn.Module, axis: int, kernel: int) -> tuple[int, int]:
    if layer.padding == "same":
        total = layer.dilation[axis] * (kernel - 1)
        return total // 2, total - total // 2
    return layer.padding[axis], layer.padding[axis]


def _pad(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    n = x.shape[axis]
    places = range(-before, n + after)
    index: Sequence[int] = {
        "zeros": [min(max(i, 0), n - 1) for i in places],
        "replicate": [min(max(i, 0), n - 1) for i in places],
        "circular": [i % n for i in places],
        "reflect": [-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i in places],
    }[mode]
    padded = x.index_select(axis, torch.tensor(index))
    if mode == "zeros":
        inside = torch.tensor([float(0 <= i < n) for i in places], dtype=x.dtype)
        padded = padded * inside.view(-1, *[1] * (x.dim() - axis - 1))
    return padded
