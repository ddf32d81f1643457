"""Attention between its projections: what `nn.MultiheadAttention` does with q, k and v.

These are the steps of `F.multi_head_attention_forward`, one for one, so that the bits are torch's;
that function itself takes weights, and there q, k and v are sums that no weight gives.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Asked(NamedTuple):
    """What is asked for: masks as numbers that are added, and whether weights are returned.

    `padding` is (batch, keys), `mask` (queries, keys) or (batch · heads, queries, keys).
    """

    padding: Tensor | None
    mask: Tensor | None
    need_weights: bool
    average: bool
    causal: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, zeros: bool, asked: Asked
) -> tuple[Tensor, Tensor | None]:
    """Return the context (queries, batch, width), and the weights where they are asked for.

    Args:
        q: (queries, batch, width).
        k: (keys, batch, width).
        v: the same.
        heads: how many equal parts of the width attend on their own.
        dropout: probability with which a weight is dropped.
        zeros: whether a key and a value of zeros are added.
        asked: masks, which cover that key already, and what is returned.
    """
    length, batch, width = q.shape
    q, k, v = (_heads_first(part, heads) for part in (q, k, v))
    if zeros:
        k, v = (
            torch.cat((part, part.new_zeros(len(part), 1, part.shape[2])), 1) for part in (k, v)
        )
    mask = _whole(asked, batch, heads, k.shape[1])
    if asked.need_weights:
        scaled = q * math.sqrt(1.0 / q.shape[2])
        scores = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
        weights = F.softmax(scores, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        context = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, width)
        weights = weights.view(batch, heads, length, k.shape[1])
        return context, weights.mean(1) if asked.average else weights
    if mask is not None:
        mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, heads, *mask.shape[1:])
    q, k, v = (part.view(batch, heads, *part.shape[1:]) for part in (q, k, v))
    causal = asked.causal and asked.padding is None
    context = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return context.permute(2, 0, 1, 3).reshape(length, batch, width), None


def numbers(
    query: Tensor, padding: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks as numbers that are added, as torch makes them of truth values."""
    canonical = F._canonical_mask
    kind = F._none_or_dtype(mask)
    return (
        canonical(padding, "key_padding_mask", kind, "attn_mask", query.dtype),
        canonical(mask, "attn_mask", None, "", query.dtype, False),
    )


def longer(asked: Asked, by: int) -> Asked:
    """Return the same with masks for so many more keys, none of which is masked."""
    padding, mask = (
        None if part is None else F.pad(part, (0, by)) for part in (asked.padding, asked.mask)
    )
    return asked._replace(padding=padding, mask=mask)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Return (length, batch, width) as (batch · heads, length, width / heads)."""
    length, batch, width = x.shape
    return x.reshape(length, batch * heads, width // heads).transpose(0, 1)


def _whole(asked: Asked, batch: int, heads: int, keys: int) -> Tensor | None:
    """Return both masks as one of three dimensions."""
    padding, mask, need_weights, _, causal = asked
    if causal and padding is None and not need_weights:
        return None
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if padding is None:
        return mask
    padding = padding.view(batch, 1, 1, keys).expand(-1, heads, -1, -1)
    padding = padding.reshape(batch * heads, 1, keys)
    return padding if mask is None else mask + padding
