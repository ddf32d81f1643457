"""Named ways to get an adapter wrong: each a small patch of the core, and the law that must see it.

A mutant names the quick check of its law that fails with it and passes without.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw.absorbing
import deltaw.adapters.dora
import deltaw.addition
import deltaw.attaching
import deltaw.building
import deltaw.fingerprint
import deltaw.formats._peft_experts
import deltaw.formats.peft
import deltaw.inits.kaiming
import deltaw.kernels.batched
import deltaw.kernels.linear
import deltaw.kernels.norms
import deltaw.kernels.shared
import deltaw.layers.attention
import deltaw.layers.conv
import deltaw.layers.conv_transpose
import deltaw.layers.embedding
import deltaw.merging
import deltaw.originals
import deltaw.snapshot
import deltaw.verifying
from deltaw.adapter import Adapter, LowRank
from deltaw.adapters._reserved import ReservedLora
from deltaw.adapters.dora import DoraAdapter
from deltaw.adapters.lora import LoraAdapter
from deltaw.adapters.replace import ReplaceAdapter
from deltaw.authority import Authority
from deltaw.config import LoraConfig
from deltaw.kernels.shared import Input, Left, Pool, SharedInput
from deltaw.layer import AdaptedLayer
from deltaw.layers import conv, linear
from deltaw.layers.attention import Attention
from deltaw.layers.conv import Conv
from deltaw.layers.conv_spanning import SpanningConv
from deltaw.layers.embedding import Embedding
from deltaw.layers.experts import Experts
from deltaw.layers.linear import Linear
from deltaw.parts import Part
from deltaw.rowmap import Division, RowMap
from deltaw.state import LayerState, State, without_twin
from deltaw.weight import AdaptedWeight
from laws import (
    test_absorbed_starts as absorbed,
)
from laws import (
    test_kernels as kernels,
)
from laws import (
    test_law01_identity as law01,
)
from laws import (
    test_law02_base as law02,
)
from laws import (
    test_law03_oracle as law03,
)
from laws import (
    test_law04_merge as law04,
)
from laws import (
    test_law05_copies as law05,
)
from laws import (
    test_law06_gradients as law06,
)
from laws import (
    test_law07_dtypes as law07,
)
from laws import (
    test_law08_compile as law08,
)
from laws import (
    test_law09_parallel as law09,
)
from laws import (
    test_law10_refusals as law10,
)
from laws import (
    test_law11_freshness as law11,
)
from laws import (
    test_reserve as reserve,
)
from laws import (
    test_rows as rows,
)
from laws.cases import BY_NAME
from laws.product import setting

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A wrong core, and the check of the law that must fail with it."""

    name: str
    law: int
    check: Callable[[], object]
    apply: Callable[[Patch], None]


MUTANTS: list[Mutant] = []


def mutant(
    name: str, law: int, check: Callable[[], object]
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Enter the patch below under a name."""

    def enter(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(name, law, check, apply))
        return apply

    return enter


def in_folder(check: Callable[[Path], object]) -> None:
    """Run a check that writes files."""
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))


def forward(name: str, **values: object) -> Callable[[], object]:
    """Law 3 on one setting in float64."""
    return lambda: law03.forward_is_the_oracles(
        setting(name, dtype=torch.float64, **values), training=bool(values.get("dropout"))
    )


@contextmanager
def set_for_a_while(owner: Any, name: str, value: object) -> Iterator[None]:
    """Another value of an attribute within a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# Law 1


@mutant("B starts at random", 1, lambda: law01.attaching_changes_no_output(setting("linear")))
def _(patch: Patch) -> None:
    def start(site: Any) -> tuple[Tensor, Tensor]:
        out, into = site.shape
        return torch.randn(site.r, into), torch.randn(out, site.r) * 1e-3

    patch.setattr(deltaw.inits.kaiming, "start", start)


@mutant(
    "a start is not subtracted",
    1,
    lambda: law01.attaching_changes_no_output(setting("linear", init="pissa")),
)
def _(patch: Patch) -> None:
    patch.setattr(LoraAdapter, "factors", lambda self: (self.lora_A, self.lora_B))


@mutant("the seed is ignored", 1, lambda: law01.start_is_the_seeds_alone(setting("gpt2-fused-101")))
def _(patch: Patch) -> None:
    real = deltaw.attaching.initial_state
    patch.setattr(
        deltaw.attaching,
        "initial_state",
        lambda model, plan, *rest: real(model, plan, None, *rest[1:]),
    )


# Law 2


@mutant(
    "the trained bias is the base's own",
    2,
    lambda: law02.base_never_changes(setting("linear", bias="all")),
)
def _(patch: Patch) -> None:
    patch.setattr(
        deltaw.building, "own", lambda t, dtype, device: t.detach().to(device=device, dtype=dtype)
    )


@mutant(
    "the running mean of the base moves",
    2,
    lambda: law02.base_never_changes(setting("linear", head=True)),
)
def _(patch: Patch) -> None:
    real = deltaw.attaching.initial_state

    def without_buffers(*args: Any) -> State:
        state = real(*args)
        layers = {
            path: replace(
                layer,
                tensors={
                    name: tensor
                    for name, tensor in layer.tensors.items()
                    if "lora" in name or isinstance(tensor, nn.Parameter)
                },
            )
            for path, layer in state.layers.items()
        }
        return replace(state, layers=layers)

    patch.setattr(deltaw.attaching, "initial_state", without_buffers)


@mutant("detach leaves the class", 2, lambda: law02.base_never_changes(setting("linear")))
def _(patch: Patch) -> None:
    patch.setattr(deltaw.attaching, "unswap", lambda module: None)


@mutant("detach leaves the base frozen", 2, lambda: law02.base_never_changes(setting("linear")))
def _(patch: Patch) -> None:
    real = deltaw.attaching._freeze

    def freeze(layers: Any, authority: Authority) -> None:
        real(layers, authority)
        authority.thawed.clear()

    patch.setattr(deltaw.attaching, "_freeze", freeze)


# Law 3


@mutant("no scale", 3, forward("linear"))
def _(patch: Patch) -> None:
    rescaled(patch, lambda scale: 1.0)


@mutant("the scale twice", 3, forward("conv2d"))
def _(patch: Patch) -> None:
    rescaled(patch, lambda scale: scale * scale)


def rescaled(patch: Patch, change: Callable[[float], float]) -> None:
    """Give every adapter another scale."""
    real = LoraAdapter.__init__

    def init(
        self: LoraAdapter, A: Tensor, B: Tensor, scale: float, *rest: Any, **named: Any
    ) -> None:
        real(self, A, B, change(scale), *rest, **named)

    patch.setattr(LoraAdapter, "__init__", init)


@mutant("experts share the factors of the first", 3, forward("experts"))
def _(patch: Patch) -> None:
    real = AdaptedWeight.__getitem__
    patch.setattr(
        AdaptedWeight,
        "__getitem__",
        lambda self, key: AdaptedWeight(self.W[key], real(self, 0).thin),
    )


@mutant("rsLoRA without the root", 3, forward("linear", rslora=True))
def _(patch: Patch) -> None:
    patch.setattr(LoraConfig, "scale", lambda self, r, alpha: alpha / r)


@mutant("A transposed", 3, forward("linear"))
def _(patch: Patch) -> None:
    real = LoraAdapter.forward

    def forward(self: LoraAdapter, matrix: Any) -> LowRank:
        update = real(self, matrix)
        A = update.A
        return update._replace(A=A.flatten().view(A.shape[1], A.shape[0]).T)

    patch.setattr(LoraAdapter, "forward", forward)


@mutant("slice off by one", 3, forward("fused-101"))
def _(patch: Patch) -> None:
    real = linear.span

    def span(slot: str, rows: int) -> tuple[int, int]:
        start, stop = real(slot, rows)
        return (start, stop) if start == 0 else (start - 1, stop - 1)

    patch.setattr(linear, "span", span)


@mutant("the first slice only", 3, forward("fused-101"))
def _(patch: Patch) -> None:
    real = AdaptedLayer.contributors
    patch.setattr(AdaptedLayer, "contributors", lambda self, *of: iter(list(real(self, *of))[:1]))


@mutant("dropout into the base", 3, forward("linear", dropout=0.25))
def _(patch: Patch) -> None:
    real = SharedInput.read

    def read(self: SharedInput, *of: Any) -> Input:
        own = real(self, *of)
        return own._replace(cast=own.read, read=own.cast)

    patch.setattr(SharedInput, "read", read)


@mutant("dropout in evaluation", 3, lambda: forward_in_evaluation())
def _(patch: Patch) -> None:
    real = AdaptedLayer.contributions
    patch.setattr(
        AdaptedLayer,
        "contributions",
        lambda self, *of: [part._replace(p=0.25) for part in real(self, *of)],
    )


def forward_in_evaluation() -> None:
    """Law 3 with a dropout that is not to be applied."""
    law03.forward_is_the_oracles(setting("linear", dtype=torch.float64, dropout=0.25))


@mutant("dilation ignored", 3, forward("conv1d-stride-dilation"))
def _(patch: Patch) -> None:
    real = deltaw.layers.conv.Setting
    patch.setattr(deltaw.layers.conv, "Setting", lambda stride, *_: real(stride, (1,), (1,), 1))


@mutant("dilation ignored in the plain steps", 3, lambda: plainly("conv1d-stride-dilation"))
def _(patch: Patch) -> None:
    ignoring(patch, Conv, dilation=(1,), padding=(1,))


def plainly(name: str) -> None:
    """Law 3 without kernels."""
    with law03.plain_steps():
        forward(name)()


@mutant("padding mode ignored in a spanning convolution", 3, forward("spanning-conv2d"))
def _(patch: Patch) -> None:
    ignoring(patch, SpanningConv, padding_mode="zeros")


@mutant("padding mode ignored", 3, forward("conv2d-depthwise"))
def _(patch: Patch) -> None:
    ignoring(patch, Conv, padding_mode="zeros")


def ignoring(patch: Patch, geometry: type[Conv], **values: object) -> None:
    """Convolve the adapter's part with other settings than the layer's."""
    real = geometry.convolve

    def convolve(self: Conv, x: Tensor, kernels: Tensor) -> Tensor:
        with ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(set_for_a_while(self, name, value))
            return real(self, x, kernels)

    patch.setattr(geometry, "convolve", convolve)


@mutant("groups share one part of B", 3, forward("conv2d-groups"))
def _(patch: Patch) -> None:
    real = Conv.term

    def term(self: Conv, *of: Any) -> Any:
        found = real(self, *of)
        first = found.B[: found.B.shape[0] // self.groups]
        return found._replace(B=first.repeat(self.groups, 1))

    patch.setattr(Conv, "term", term)


@mutant("groups of a spanning convolution mixed up", 3, forward("spanning-conv2d"))
def _(patch: Patch) -> None:
    real = SpanningConv.low_rank

    def low_rank(self: Conv, x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
        return real(self, x, A.roll(A.shape[0] // self.groups, 0), B, *rest)

    patch.setattr(SpanningConv, "low_rank", low_rank)


@mutant("embed_scale ignored", 3, forward("embedding-scaled"))
def _(patch: Patch) -> None:
    patch.setattr(Embedding, "size", lambda self: 1.0)


@mutant("silent under no_grad", 3, forward("linear"))
def _(patch: Patch) -> None:
    real = AdaptedLayer.contributors
    patch.setattr(
        AdaptedLayer,
        "contributors",
        lambda self, *of: real(self, *of) if torch.is_grad_enabled() else iter(()),
    )


@mutant("the bias on B unscaled", 3, forward("linear", lora_bias=True))
def _(patch: Patch) -> None:
    patch.setattr(LoraAdapter, "bias_delta", lambda self: self.lora_B_bias)


@mutant("A detached from the gradient", 3, lambda: law03.gradients_are_the_oracles(setting("gpt2")))
def _(patch: Patch) -> None:
    real = LoraAdapter.forward

    def forward(self: LoraAdapter, matrix: Any) -> LowRank:
        update = real(self, matrix)
        return update._replace(A=update.A.detach() * 0.5 + update.A * 0.5)

    patch.setattr(LoraAdapter, "forward", forward)


@mutant(
    "the input's gradient lacks the adapter's part",
    3,
    lambda: law03.gradients_are_the_oracles(setting("gpt2")),
)
def _(patch: Patch) -> None:
    real = deltaw.kernels.shared._product
    patch.setattr(deltaw.kernels.shared, "_product", lambda alike: real(alike).zero_())


@mutant(
    "the input's gradient lacks the mask",
    3,
    lambda: law03.gradients_are_the_oracles(setting("linear", dropout=0.25)),
)
def _(patch: Patch) -> None:
    real = Pool.leave
    patch.setattr(Pool, "leave", lambda self, left: real(self, left._replace(mask=None)))


@mutant(
    "masks shared across a checkpoint",
    9,
    lambda: kernels.recomputation_draws_the_same_masks("the last two", True),
)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.kernels.shared, "_region", lambda: "one")


@mutant("the pool takes one reader alone", 3, lambda: kernels.shared_gradient_is_the_sum())
def _(patch: Patch) -> None:
    real = Pool.leave

    def leave(self: Pool, left: Left) -> None:
        self._left.clear()
        real(self, left)

    patch.setattr(Pool, "leave", leave)


@mutant("X kept in float32", 3, lambda: kernels.saved_bytes_are_the_least(torch.bfloat16))
def _(patch: Patch) -> None:
    real = SharedInput.read

    def read(self: SharedInput, *of: Any) -> Input:
        own = real(self, *of)
        return own._replace(read=own.read.float().to(own.cast.dtype))

    patch.setattr(SharedInput, "read", read)


@mutant(
    "the weight of a sum ignored", 3, lambda: law03.weighted_sum_is_the_oracles(BY_NAME["linear"])
)
def _(patch: Patch) -> None:
    real = AdaptedLayer.contributors
    patch.setattr(
        AdaptedLayer,
        "contributors",
        lambda self, *of: ((s, a, 1.0) for s, a, _ in real(self, *of)),
    )


@mutant(
    "the second active adapter ignored",
    3,
    lambda: law03.weighted_sum_is_the_oracles(BY_NAME["conv2d"]),
)
def _(patch: Patch) -> None:
    real = Authority.current
    patch.setattr(Authority, "current", lambda self: real(self)[:1])


@mutant("the norm of W alone", 3, forward("linear", method="dora"))
def _(patch: Patch) -> None:
    patch.setattr(DoraAdapter, "norms", lambda self, W: W.norm(dim=1))


@mutant("the norm of the columns", 3, forward("gpt2", method="dora"))
def _(patch: Patch) -> None:
    real = DoraAdapter.norms
    patch.setattr(DoraAdapter, "norms", lambda self, W: real(self, W).flip(0))


@mutant("a gain on the bias", 3, forward("linear", method="dora"))
def _(patch: Patch) -> None:
    for module in (deltaw.kernels.linear, linear):
        real = deltaw.kernels.linear.rescale
        patch.setattr(module, "rescale", lambda y, gain, bias, real=real: real(y, gain, None))


@mutant(
    "a gradient through the norm",
    3,
    lambda: law03.gradients_are_the_oracles(setting("linear", method="dora")),
)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.adapters.dora, "row_norms", deltaw.kernels.norms.row_norms.__wrapped__)


@mutant(
    "the magnitude's gradient of the whole output",
    3,
    lambda: law03.gradients_are_the_oracles(setting("linear", method="dora")),
)
def _(patch: Patch) -> None:
    real = deltaw.kernels.linear._gain_gradient
    patch.setattr(deltaw.kernels.linear, "_gain_gradient", lambda d, y, g, _: real(d, y, g, []))


@mutant("a bank without gains", 3, lambda: rows.every_way(BY_NAME["linear"], method="dora"))
def _(patch: Patch) -> None:
    real = linear.stacked
    patch.setattr(linear, "stacked", lambda terms, dtype, of, *_: real(terms, dtype, of))


@mutant("the output of attention counted twice", 3, forward("attention"))
def _(patch: Patch) -> None:
    real = Attention.added

    def added(self: Attention, x: Tensor, y: Tensor, parts: Any, *dropped: Any) -> Tensor:
        twice = [part for part in parts if part.slot == "out"]
        return real(self, x, real(self, x, y, parts, *dropped), twice)

    patch.setattr(Attention, "added", added)


@mutant("keys and values of attention mixed up", 3, forward("attention-across"))
def _(patch: Patch) -> None:
    real = Attention.contributions
    other = {"k": "v", "v": "k"}

    def contributions(self: Attention, *of: Any) -> list[Part]:
        return [p._replace(slot=other.get(p.slot, p.slot)) for p in real(self, *of)]

    patch.setattr(Attention, "contributions", contributions)


@mutant("masks of attention ignored", 3, lambda: law03.attention_under_a_mask())
def _(patch: Patch) -> None:
    real = deltaw.layers.attention.attend
    patch.setattr(
        deltaw.layers.attention,
        "attend",
        lambda *of: real(*of[:-1], of[-1]._replace(padding=None, mask=None)),
    )


@mutant("groups of a transposed convolution mixed up", 3, forward("transposed2d-groups"))
def _(patch: Patch) -> None:
    patch.setattr(
        deltaw.layers.conv_transpose, "mix", lambda S, B, *of: conv.mix(S, B.flip(0), *of)
    )


@mutant("an encoder on its fast path", 3, lambda: law03.encoders_agree_without_gradients())
def _(patch: Patch) -> None:
    patch.setattr(deltaw.attaching, "walk_through", lambda model: None)


@mutant("a row under its neighbour's adapter", 3, lambda: rows.every_way(BY_NAME["linear"]))
def _(patch: Patch) -> None:
    real = Division._rows

    def neighbour(self: Division, place: int) -> Any:
        return real(self, (place + 1) % len(self.distinct))

    patch.setattr(Division, "_rows", neighbour)


@mutant("all adapters on every row", 3, lambda: rows.every_way(BY_NAME["linear"]))
def _(patch: Patch) -> None:
    real = linear.add_masked

    def add_masked(y: Tensor, x: Tensor, bank: Any, index: Tensor) -> None:
        for place in range(len(bank.A)):
            real(y, x, bank, torch.full_like(index, place))

    patch.setattr(linear, "add_masked", add_masked)


@mutant("equal groups out of order", 3, lambda: rows.every_way(BY_NAME["linear"]))
def _(patch: Patch) -> None:
    real = linear.add_batched
    patch.setattr(
        linear,
        "add_batched",
        lambda y, x, bank: real(y, x, bank._replace(A=bank.A.flip(0))),
    )


@mutant("groups trained crosswise", 6, rows.groups_train_their_own)
def _(patch: Patch) -> None:
    real = deltaw.kernels.batched._stacked
    patch.setattr(
        deltaw.kernels.batched,
        "_stacked",
        lambda *of: tuple(whole.flip(0) for whole in real(*of)),
    )


@mutant("beams taken for rows", 3, lambda: rows.every_way(BY_NAME["linear"]))
def _(patch: Patch) -> None:
    def divide(self: RowMap, count: int, device: torch.device) -> Division:
        return Division(self.index.repeat(count // len(self.index)), self.distinct)

    patch.setattr(RowMap, "divide", divide)


# Law 4


@mutant("unmerge subtracts", 4, lambda: law04.merge_keeps_the_output(setting("linear")))
def _(patch: Patch) -> None:
    def give_back(model: nn.Module, layer: AdaptedLayer, name: str, tensor: Tensor | None) -> None:
        del layer.originals[name]
        W = layer.frozen(name)
        W.data = W.data - (layer.adapter["default"][name].delta(W.float())).to(W.dtype)

    patch.setattr(deltaw.merging, "_give_back", give_back)


@mutant(
    "a merge rounds twice in bfloat16",
    4,
    lambda: law04.general_values_are_rounded_once(torch.bfloat16),
)
def _(patch: Patch) -> None:
    rounded_before_the_sum(patch, torch.bfloat16)


def rounded_before_the_sum(patch: Patch, to: torch.dtype) -> None:
    """Round ΔW before it is added."""

    def add_products(W: Tensor, products: Any, dtype: torch.dtype) -> Tensor:
        return (W.float() + sum(L @ R for L, R in products).to(to)).to(dtype)

    patch.setattr(deltaw.addition, "add_products", add_products)


@mutant(
    "a merge in half precision",
    4,
    lambda: law04.general_values_are_rounded_once(torch.float16),
)
def _(patch: Patch) -> None:
    rounded_before_the_sum(patch, torch.float16)


@mutant("a merge takes the first of a sum", 4, lambda: law04.merged_sum_is_the_oracles())
def _(patch: Patch) -> None:
    real = deltaw.merging.addition_of
    patch.setattr(
        deltaw.merging, "addition_of", lambda layer, active, name: real(layer, active[:1], name)
    )


@mutant("disabled leaks the head", 4, lambda: law04.off_is_the_base(setting("linear", head=True)))
def _(patch: Patch) -> None:
    real = AdaptedLayer.copies
    patch.setattr(
        AdaptedLayer,
        "copies",
        lambda self, name, active: real(self, name, active or self.authority.active),
    )


@mutant("disabled only without gradients", 4, lambda: law04.off_is_the_base(setting("linear")))
def _(patch: Patch) -> None:
    real = Authority.current
    patch.setattr(
        Authority,
        "current",
        lambda self: real(self) if torch.is_grad_enabled() else self.active,
    )


@mutant(
    "unmerge overwrites what was written since",
    4,
    lambda: law04.unmerge_refuses_changed_weights(law04.CHANGES["data"]),
)
def _(patch: Patch) -> None:
    for module in (deltaw.merging, deltaw.originals):
        patch.setattr(module, "bits", lambda tensor: 0)


@mutant(
    "the digest is blind to order",
    4,
    lambda: law04.unmerge_refuses_changed_weights(law04.CHANGES["swapped"]),
)
def _(patch: Patch) -> None:
    for module in (deltaw.merging, deltaw.originals):
        patch.setattr(module, "bits", lambda tensor: int(tensor.double().sum() * 2**40))


# Law 5


@mutant(
    "deepcopy shares the adapter",
    5,
    lambda: law05.copies_keep_the_output(setting("linear")),
)
def _(patch: Patch) -> None:
    patch.setattr(LoraAdapter, "__deepcopy__", lambda self, memo: self, raising=False)


@mutant(
    "a copy shares the authority", 5, lambda: law05.copies_keep_the_output(setting("embedding"))
)
def _(patch: Patch) -> None:
    patch.setattr(Authority, "__deepcopy__", lambda self, memo: self, raising=False)


@mutant("saved under the wrong name", 5, lambda: in_folder(law05.several_adapters_come_back))
def _(patch: Patch) -> None:
    real = deltaw.snapshot._layer_state
    patch.setattr(
        deltaw.snapshot,
        "_layer_state",
        lambda layer, name: real(layer, next(iter(layer.adapter))),
    )


@mutant(
    "an absorbed start is subtracted again",
    3,
    lambda: absorbed.test_outputs_and_gradients_are_those_of_the_subtracted_start(
        BY_NAME["linear"]
    ),
)
def _(patch: Patch) -> None:
    def factors(self: LoraAdapter) -> tuple[Tensor, Tensor]:
        A, B = self.lora_A, self.lora_B
        return without_twin(A, B, self.start_A, self.start_B) if self.twin else (A, B)

    patch.setattr(LoraAdapter, "factors", factors)


@mutant(
    "a start is absorbed without its scale",
    3,
    lambda: absorbed.test_the_residual_is_w_less_the_start(BY_NAME["gpt2-fused-101"]),
)
def _(patch: Patch) -> None:
    real = deltaw.absorbing.Absorption._residual

    def residual(self: Any, layer: Any, holder: str, slots: Any) -> Tensor:
        return real(self, layer, holder, [replace(slot, scale=1.0) for slot in slots])

    patch.setattr(deltaw.absorbing.Absorption, "_residual", residual)


@mutant(
    "what is left of W is taken for the base",
    5,
    lambda: in_folder(
        lambda p: absorbed.test_the_file_is_one_for_the_base_as_it_was(BY_NAME["linear"], p)
    ),
)
def _(patch: Patch) -> None:
    real = deltaw.absorbing.Absorption.apply

    def apply(self: Any, layers: Any, fits: Any) -> None:
        real(self, layers, fits)
        layers[""].authority.fingerprints.clear()

    patch.setattr(deltaw.absorbing.Absorption, "apply", apply)


@mutant(
    "what is left of W is given as the base's",
    10,
    lambda: absorbed.test_there_is_no_base_to_go_back_to(),
)
def _(patch: Patch) -> None:
    patch.setattr(Authority, "require_base", lambda self, doing: None)


@mutant(
    "a start is lost on disk",
    5,
    lambda: in_folder(lambda p: law05.saving_keeps_the_output(setting("linear", init="pissa"), p)),
)
def _(patch: Patch) -> None:
    def without(layer: LayerState) -> LayerState:
        kept = {name: t for name, t in layer.tensors.items() if ".start_" not in name}
        return replace(layer, tensors=kept)

    patch.setattr(deltaw.formats.peft, "plain", without)


@mutant(
    "slices saved under the wrong index",
    5,
    lambda: in_folder(lambda p: law05.saving_keeps_the_output(setting("fused-1110"), p)),
)
def _(patch: Patch) -> None:
    real = deltaw.snapshot._outer

    def outer(slot: str, enabled: tuple[bool, ...]) -> tuple[str, tuple[bool, ...]]:
        swapped = {"slice_0_of_4": "slice_1_of_4", "slice_1_of_4": "slice_0_of_4"}
        return real(swapped.get(slot, slot), enabled)

    patch.setattr(deltaw.snapshot, "_outer", outer)


@mutant(
    "the scale is lost on disk",
    5,
    lambda: in_folder(lambda p: law05.saving_keeps_the_output(setting("linear"), p)),
)
def _(patch: Patch) -> None:
    real = deltaw.snapshot._layer_state

    def layer_state(layer: AdaptedLayer, name: str) -> LayerState:
        state = copy.copy(real(layer, name))
        object.__setattr__(state, "scale", 1.0)
        return state

    patch.setattr(deltaw.snapshot, "_layer_state", layer_state)


@mutant(
    "the expert changes slowest in B",
    5,
    lambda: in_folder(lambda f: law05.saving_keeps_the_output(setting("experts"), f)),
)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.formats._peft_experts, "packed", lambda b: b.permute(1, 0, 2).flatten(1))


# Law 6


@mutant(
    "requires_grad left on the base",
    6,
    lambda: law06.exactly_the_wanted_train(setting("linear")),
)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.attaching, "_freeze", lambda *args: None)


@mutant("the padding row trains", 6, lambda: law06.the_padding_row_gets_nothing("embedding-scaled"))
def _(patch: Patch) -> None:
    real = deltaw.layers.embedding.embedding
    patch.setattr(
        deltaw.layers.embedding,
        "embedding",
        lambda base, ids, _, terms: real(base, ids, None, terms),
    )


@mutant("idle adapters decay", 6, lambda: law06.idle_adapters_stay(setting("linear")))
def _(patch: Patch) -> None:
    real = AdaptedLayer.contributors

    def contributors(self: AdaptedLayer, *of: Any) -> Iterator[tuple[str, Adapter, float]]:
        yield from real(self, *of)
        for name in self.adapter:
            if name not in dict(self.authority.current()):
                yield "weight", self.adapter[name]["weight"], 0.0

    patch.setattr(AdaptedLayer, "contributors", contributors)


# Law 7


@mutant(
    "float32 output of a half-precision base",
    7,
    lambda: plain_output_has_the_bases_dtype(),
)
def _(patch: Patch) -> None:
    patch.setattr(Linear, "place", lambda self, y, delta, slot: y + delta.float())


@mutant(
    "masters in half precision",
    7,
    lambda: law07.output_has_the_bases_dtype(setting("linear", dtype=torch.float16)),
)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.building, "master_dtype", lambda weight: weight.dtype)


def plain_output_has_the_bases_dtype() -> None:
    """Law 7 without kernels."""
    with law03.plain_steps():
        law07.output_has_the_bases_dtype(setting("linear", dtype=torch.bfloat16))


@mutant("casting goes unnoticed", 7, lambda: casting_is_refused())
def _(patch: Patch) -> None:
    patch.setattr("deltaw.root.refuse_cast", lambda module, fn: None)
    patch.setattr("deltaw.adapter.refuse_cast", lambda module, fn: None)


def casting_is_refused() -> None:
    """Law 7's refusal."""
    law07.test_casting_after_attach_is_refused(law07.CASTS["half"])


# Law 8


@mutant(
    "the active adapter is a Python value",
    8,
    lambda: law08.switching_recompiles_nothing(choices=("a", "c")),
)
def _(patch: Patch) -> None:
    patch.setattr(AdaptedLayer, "in_force", lambda self: list(self.authority.current()))


@mutant(
    "hot-swapping keeps the old values",
    8,
    lambda: in_folder(law08.hot_swapping_recompiles_nothing),
)
def _(patch: Patch) -> None:
    patch.setattr("deltaw.hotswap._copied_in_place", lambda *args: True)


def swapped() -> None:
    """Law 8 for adapters of other ranks."""
    in_folder(lambda folder: reserve.in_place_of_another(BY_NAME["linear"], folder))


@mutant("a reserve keeps what a higher rank left", 8, swapped)
def _(patch: Patch) -> None:
    real = ReservedLora.put

    def put(self: ReservedLora, *of: Any) -> None:
        before = self.lora_A.clone(), self.lora_B.clone()
        real(self, *of)
        with torch.no_grad():
            self.lora_A[self.rank :] = before[0][self.rank :]
            self.lora_B[:, self.rank :] = before[1][:, self.rank :]

    patch.setattr(ReservedLora, "put", put)


@mutant("a reserve keeps its scale", 8, swapped)
def _(patch: Patch) -> None:
    real = ReservedLora.put

    def put(self: ReservedLora, A: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> None:
        real(self, A, B, float(self.gain) or scale, bias)

    patch.setattr(ReservedLora, "put", put)


# Law 9


@mutant(
    "a switch before backward goes unnoticed",
    9,
    lambda: law09.switching_before_backward_raises("another", True),
)
def _(patch: Patch) -> None:
    patch.setattr(Authority, "note_forward", Authority.current)


@mutant(
    "another dropout mask in the recomputation",
    9,
    lambda: law09.checkpointing_changes_nothing(setting("linear", dropout=0.25), True),
)
def _(patch: Patch) -> None:
    fresh = torch.Generator().manual_seed(0)

    def keep_mask(x: Tensor, p: float) -> Tensor:
        return (torch.rand(x.shape, generator=fresh) >= p).to(torch.uint8)

    patch.setattr(deltaw.kernels.shared, "keep_mask", keep_mask)


# Law 10


@mutant("tied weights merged in silence", 10, law10.tied_weights_are_refused)
def _(patch: Patch) -> None:
    patch.setattr(deltaw.merging, "shared_memory", lambda model, root: {})


@mutant("NaN merged", 10, lambda: law10.values_are_checked(float("nan")))
def _(patch: Patch) -> None:
    patch.setattr(deltaw.merging, "is_finite", lambda tensor: True)


@mutant("any base will do", 10, lambda: in_folder(law10.another_base_is_refused))
def _(patch: Patch) -> None:
    patch.setattr("deltaw.loading._check_base", lambda *args: None)


@mutant(
    "only the first misfit is told", 10, lambda: law10.misfits_are_all_listed(setting("linear"))
)
def _(patch: Patch) -> None:
    real = deltaw.attaching.raise_all
    patch.setattr(
        deltaw.attaching,
        "raise_all",
        lambda error, head, problems, fix="": real(error, head, problems[:1], fix),
    )


@mutant("verify looks at training alone", 10, lambda: law10.verify_finds_what_hides(False))
def _(patch: Patch) -> None:
    real = deltaw.verifying._ran
    patch.setattr(
        deltaw.verifying,
        "_ran",
        lambda model, found, batch, *, train: real(model, found, batch, train=True),
    )


# Law 11


@mutant("a stale cast", 11, lambda: freshness("fused"))
def _(patch: Patch) -> None:
    stale(patch)


@mutant("a stale cast after a write to .data", 11, lambda: freshness("data"))
def _(patch: Patch) -> None:
    stale(patch)


def stale(patch: Patch) -> None:
    """Keep the cast of A by the version of the parameter, which a fused step does not bump."""
    patch.setattr(deltaw.kernels.linear, "_times", kept(deltaw.kernels.linear._times))


def kept(cast: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known: dict[tuple[int, int], Tensor] = {}

    def recalled(tensor: Tensor, *of: Any) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return cast(tensor, *of)
        return known.setdefault((id(tensor), tensor._version), cast(tensor, *of).clone())

    return recalled


@mutant("stacked factors kept for the next block", 11, rows.blocks_are_fresh)
def _(patch: Patch) -> None:
    patch.setattr(RowMap, "forget", lambda self: None)


@mutant(
    "factors of experts read once",
    11,
    lambda: law11.forward_is_fresh(setting("experts"), law11.CHANGES["new data"]),
)
def _(patch: Patch) -> None:
    def alike(self: Experts, x: Tensor) -> Tensor:
        vars(self).setdefault("_read", {})
        return self.base(x)

    patch.setattr(Experts, "alike", alike)


@mutant("a trained copy read once", 11, lambda: freshness("foreach"))
def _(patch: Patch) -> None:
    kept: dict[int, Tensor] = {}
    patch.setattr(
        ReplaceAdapter,
        "forward",
        lambda self: kept.setdefault(id(self), self.trained.clone()),
    )


def freshness(change: str) -> None:
    """Law 11 on a linear layer with a head."""
    s = setting("linear", head=True, dtype=torch.bfloat16)
    law11.forward_is_fresh(s, law11.CHANGES[change])
