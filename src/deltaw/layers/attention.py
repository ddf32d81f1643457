"""`nn.MultiheadAttention`: four linear maps, of the queries, keys, values and of what they give.

torch reads all four weights past the forward of any layer, and on its fast path past that of the
attention too. Here each map is W x as torch computes it plus what the adapters add, and attention
itself is torch's steps; with no adapter in force torch's own forward runs, fast path included.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import StateError
from deltaw.kernels.attention import Asked, attend, longer, numbers
from deltaw.layer import AdaptedLayer
from deltaw.parts import Part
from deltaw.rowmap import RowMap
from deltaw.rowwise import RowError
from deltaw.state import LayerState
from deltaw.swap import origin_of

SLOTS = ("q", "k", "v", "out")
Inputs = tuple[Tensor, Tensor, Tensor]
Output = tuple[Tensor, Tensor | None]

if TYPE_CHECKING:
    _Attention = nn.MultiheadAttention
else:
    _Attention = object


class Attention(AdaptedLayer, _Attention):  # type: ignore[misc]
    """Slots q, k, v (width, own width) and out (width, width), each adapted or not.

    The first three lie in `in_proj_weight`, or in weights of their own where keys or values have
    another width, and the last in the child `out_proj`.
    """

    kind = "attention"
    takes = "nn.MultiheadAttention"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take `nn.MultiheadAttention`."""
        return isinstance(layer, nn.MultiheadAttention)

    @classmethod
    def refusals(cls, layer: nn.Module) -> list[str]:
        """Refuse weights that are no parameters, and an output projection that is not linear."""
        assert isinstance(layer, nn.MultiheadAttention)
        own = [layer._parameters.get("in_proj_weight")]
        if not layer._qkv_same_embed_dim:
            own = [layer._parameters.get(f"{slot}_proj_weight") for slot in SLOTS[:3]]
        if any(weight is None for weight in (*own, layer.out_proj._parameters.get("weight"))):
            return ["one of its weights is computed (a parametrisation), not a parameter"]
        if origin_of(layer.out_proj).forward is not nn.Linear.forward:
            return [f"its out_proj is a {origin_of(layer.out_proj).__name__}, not linear"]
        return []

    @classmethod
    def plain(cls, layer: nn.Module) -> bool:
        """Tell whether the layer runs the forward of `nn.MultiheadAttention`."""
        return origin_of(layer).forward is nn.MultiheadAttention.forward

    def slots(self, enabled: Sequence[bool]) -> tuple[str, ...]:
        """Return those of q, k, v and out that are marked; all of them by default."""
        return tuple(s for s, on in zip(SLOTS, enabled or [True] * 4, strict=True) if on)

    def holder(self, slot: str) -> str:
        """Return the parameter that holds a slot, in three of four cases a part of one."""
        if slot == "out":
            return "out_proj.weight"
        return "in_proj_weight" if self._qkv_same_embed_dim else f"{slot}_proj_weight"

    def bias_name(self, slot: str) -> str:
        """Return the bias of the outputs, or that of queries, keys and values together."""
        return "out_proj.bias" if slot == "out" else "in_proj_bias"

    def shape(self, slot: str) -> tuple[int, int]:
        """Return (out, in) of the slot."""
        return self.embed_dim, self.frozen(self.holder(slot)).shape[1]

    def matrix(self, slot: str) -> Tensor:
        """Return the weight of the slot."""
        W = self.frozen(self.holder(slot))
        return W[self._rows(slot)] if self._packed(slot) else W

    def layout(self, M: Tensor, slot: str) -> Tensor:
        """Return M, among rows of zeros where queries, keys and values share a weight."""
        return self._placed(M, slot) if self._packed(slot) else M

    def thin(self, A: Tensor, B: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """Return B, perhaps among rows of zeros, and A."""
        return self.layout(B, slot), A

    def act(self, x: Tensor, M: Tensor, slot: str) -> Tensor:
        """Return M x."""
        return F.linear(x, M.to(x.dtype))

    def product(self, x: Tensor, base: Tensor, slot: str) -> Tensor:
        """Return the output of the slot's map less its bias."""
        bias: Tensor | None = self.out_proj.bias if slot == "out" else self.in_proj_bias
        if bias is not None and slot != "out":
            bias = bias[self._rows(slot)]
        return base if bias is None else base - bias.to(base.dtype)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, slot: str) -> Tensor:
        """Return B (scale A x)."""
        return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))

    def spread(self, v: Tensor, slot: str) -> Tensor:
        """Return v, among zeros where it is for the bias of queries, keys and values."""
        return v if slot == "out" else self._placed(v, slot)

    def alike(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        """Attend with what the adapters add to each map; arguments are torch's."""
        parts = self.contributions()
        if not parts:
            given = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return self.base(query, key, value, *given)  # type: ignore[return-value]
        if query.is_nested or key.is_nested or value.is_nested:
            raise StateError(
                "Nested tensors are for torch's fast path, which an active adapter is not on.\n"
                "Fix: give padded tensors and key_padding_mask."
            )
        padding, mask = numbers(query, key_padding_mask, attn_mask)
        batched = F._mha_shape_check(query, key, value, padding, mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is not given")
        if not batched and padding is not None:
            padding = padding.unsqueeze(0)
        asked = Asked(padding, mask, need_weights, average_attn_weights, is_causal)
        inputs = query, key, value
        if not batched:
            each = _each(inputs, lambda x: x.unsqueeze(1))
            apart = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            output, weights = self._attended(each, apart, parts, asked)
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        turned = self.batch_first
        ordered = _each(inputs, lambda x: x.transpose(0, 1)) if turned else inputs
        output, weights = self._attended(inputs, ordered, parts, asked, turned)
        return output.transpose(0, 1) if turned else output, weights

    def _attended(
        self,
        inputs: Inputs,
        ordered: Inputs,
        parts: Sequence[Part],
        asked: Asked,
        turned: bool = False,
    ) -> Output:
        """Return the output (queries, batch, width), and the weights.

        Adapters read the inputs as they lie, perhaps `turned`. The base reads them `ordered`, each
        by itself unless two are one tensor, which unbatched ones never are for torch.
        """
        adapted = []
        drawn: list[tuple[Tensor, Mapping[float, Tensor]]] = []
        for slot, x, y in zip(SLOTS, inputs, self._projected(*ordered), strict=False):
            own = [part for part in parts if part.slot == slot]
            if own and not any(seen is x for seen, _ in drawn):
                inner = [part for part in parts if part.slot != "out"]
                drawn.append((x, self.dropped(x, inner)))
            dropped = next((masked for seen, masked in drawn if seen is x), None)
            y = self.added(x, y.transpose(0, 1) if turned else y, own, dropped)
            adapted.append(y.transpose(0, 1) if turned else y)
        q, k, v = adapted
        if self.bias_k is not None and self.bias_v is not None:
            ones = 1, q.shape[1], 1
            k = torch.cat((k, self.bias_k.repeat(*ones)))
            v = torch.cat((v, self.bias_v.repeat(*ones)))
            asked = longer(asked, 1)
        asked = longer(asked, 1) if self.add_zero_attn else asked
        p = self.dropout if self.training else 0.0
        context, weights = attend(q, k, v, self.num_heads, p, self.add_zero_attn, asked)
        y = F.linear(context.flatten(0, 1), self.out_proj.weight, self.out_proj.bias)
        own = [part for part in parts if part.slot == "out"]
        return self.added(context, y.view(context.shape), own), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values as torch projects them."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            packed: Sequence[Tensor] = F._in_projection_packed(  # type: ignore[attr-defined]
                query, key, value, self.in_proj_weight, bias
            )
            return packed
        biases = (None, None, None) if bias is None else bias.chunk(3)
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return [
            F.linear(x, W, b) for x, W, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def by_rows(self, rows: RowMap, *args: Any, **kwargs: Any) -> Output:  # type: ignore[override]
        """Run the layer for the rows of each adapter in turn, or compiled for all and choose."""
        if not any(name in self.adapter for name in rows.distinct):
            return self.base(*args, **kwargs)  # type: ignore[return-value]
        if torch.compiler.is_compiling():
            return self._at_once(rows, *args, **kwargs)
        self.authority.note_forward()
        return self._in_turn(rows, *args, **kwargs)

    def _at_once(self, rows: RowMap, query: Tensor, *args: Any, **kwargs: Any) -> Output:
        each = self._count(rows, query)
        index = rows.index.repeat_interleave(each).to(query.device).view(-1, 1, 1)
        with self.authority.only(None):
            y, weights = self.alike(query, *args, **kwargs)
        for place, name in enumerate(rows.distinct):
            with self.authority.only(name):
                own, own_weights = self.alike(query, *args, **kwargs)
            chosen = index == place
            y = torch.where(chosen if self.batch_first else chosen.transpose(0, 1), own, y)
            if weights is not None and own_weights is not None:
                chosen = chosen if weights.dim() == 3 else chosen.unsqueeze(-1)
                weights = torch.where(chosen, own_weights, weights)
        return y, weights

    def _count(self, rows: RowMap, query: Tensor) -> int:
        """Return how many rows of the layer there are for each of the batch."""
        count = query.shape[0 if self.batch_first else 1] if query.dim() == 3 else 0
        if count == 0 or count % len(rows.index):
            raise RowError(
                self,
                f"got {count or 'no'} rows, and {len(rows.index)} rows of the batch have adapters "
                "of their own; it can be as many, or a multiple: each row several times (beams)",
            )
        return count // len(rows.index)

    def _in_turn(
        self,
        rows: RowMap,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        axis = 0 if self.batch_first else 1
        each = self._count(rows, query)
        found: list[Output] = []
        order: list[int] = []
        for name in dict.fromkeys(rows.names):
            own = [each * i + j for i, n in enumerate(rows.names) if n == name for j in range(each)]
            order += own
            index = torch.tensor(own, device=query.device)
            chosen = functools.partial(torch.index_select, dim=axis, index=index)
            inputs = _each((query, key, value), chosen)
            padding = None if key_padding_mask is None else key_padding_mask[index]
            mask = attn_mask
            if mask is not None and mask.dim() == 3:
                mask = mask.view(each * len(rows.index), -1, *mask.shape[1:])[index].flatten(0, 1)
            with self.authority.only(name):
                found.append(
                    self.alike(
                        *inputs, padding, need_weights, mask, average_attn_weights, is_causal
                    )
                )
        back = torch.tensor(order, device=query.device).argsort()
        output = torch.cat([y for y, _ in found], axis).index_select(axis, back)
        weights = [w for _, w in found if w is not None]
        return output, torch.cat(weights)[back] if weights else None

    def _packed(self, slot: str) -> bool:
        return slot != "out" and self._qkv_same_embed_dim

    def _rows(self, slot: str) -> slice:
        """Return where a slot lies among queries, keys and values."""
        start = SLOTS.index(slot) * self.embed_dim
        return slice(start, start + self.embed_dim)

    def _placed(self, tensor: Tensor, slot: str) -> Tensor:
        """Return three times as many rows, `tensor` where the slot lies and zeros elsewhere."""
        before = self._rows(slot).start
        after = 2 * self.embed_dim - before
        return F.pad(tensor, (*[0, 0] * (tensor.dim() - 1), before, after))


def _each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs changed, those that were the same tensor as one tensor still."""
    query, key, value = inputs
    q = change(query)
    k = q if key is query else change(key)
    return q, k, k if value is key else q if value is query else change(value)
