"""Law 3: the output is that of the plain layer carrying W' = W + s B A, gradients included."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltaw
from deltaw.adapter import Adapter, Dense, LowRank, Rescaled
from deltaw.adapters.lora import LoraAdapter
from deltaw.kernels.dropout import keep_mask, rounded
from deltaw.layer import AdaptedLayer
from deltaw.layers import geometries
from laws import oracle
from laws.building import adapt, base, fill, loss, parts, unpacked
from laws.cases import CASES, Case, others, with_itself
from laws.product import Setting, setting
from laws.running import over_cases, over_pairs, whole_product

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 4e-2,
    torch.float16: 4e-3,
}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Compare relative to the size of the whole; what is meant for float64 is wider in float32."""
    if a.dtype is torch.float32 and tolerance < 1e-9:
        tolerance = 2e-4
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    error = float((a - b).abs().max()) / max(float(b.abs().max()), 1.0)
    assert error <= tolerance


def leaves(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The state's tensors of `layer` in float64, as leaves."""
    layers = deltaw.capture(model, name).layers
    tensors = dict(layers["layer"].tensors)
    if "layer.out_proj" in layers:
        own = layers["layer.out_proj"].tensors
        tensors |= {f"out_proj.{key}": tensor for key, tensor in own.items()}
    return {
        key: t.double().clone().requires_grad_(t.is_floating_point()) for key, t in tensors.items()
    }


def expected(
    setting: Setting,
    model: nn.Module,
    x: Tensor,
    tensors: dict[str, Tensor],
    dropped: list[Tensor],
) -> Tensor:
    """The output of `layer`, by hand; `dropped` holds the input of each slot's adapter."""
    case, layer = setting.case, model.layer
    if case.file == "attention":
        return attended(setting, model, x, tensors)
    own = {k: p for k, p in layer._parameters.items() if p is not None}
    W = tensors.get("weight.trained", layer.dense().detach().double())
    b = tensors.get("bias.trained", own["bias"].detach().double() if "bias" in own else None)
    if case.form == "module":
        return case.apply(layer, x, W, b)
    if case.form == "spanning":
        W = oracle.spread(layer, W)
    y = case.apply(layer, x, W, b)
    for slot, x_ in zip(slots(case), dropped, strict=True):
        one = {k: t for k, t in tensors.items() if k.startswith(slot)}
        y = y + case.apply(layer, x_, delta_of(setting, layer, one), None)
    return y + lora_bias(setting, tensors, y)


def attended(setting: Setting, model: nn.Module, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The output of an attention, whose masks of dropout are drawn here as the layer draws them."""
    layer = model.layer
    W = oracle.attention_weights(layer)
    deltas = oracle.attention_deltas(tensors, setting.scale)
    if setting.method != "lora":
        deltas = {
            slot: oracle.dora_delta(
                layer, W[slot], delta, tensors[f"{slot}.lora_magnitude_vector"], 0
            )
            for slot, delta in deltas.items()
        }
    masks: dict[int, Tensor] = {}
    masked = model.training and setting.dropout > 0

    def added(slot: str, x: Tensor) -> Tensor:
        if slot not in deltas:
            return torch.zeros((), dtype=torch.float64)
        if masked and id(x) not in masks:
            turned = slot == "out" or not layer.batch_first
            mask = keep_mask(x.transpose(0, 1) if turned else x, setting.dropout)
            mask = mask.transpose(0, 1) if turned else mask
            masks[id(x)] = mask.double() / (1 - rounded(setting.dropout))
        y = oracle.linear(layer, x * masks[id(x)] if masked else x, deltas[slot], None)
        shift = tensors.get(f"{slot}.lora_B_bias")
        return y if shift is None else y + setting.scale * shift

    return attention_of(setting.case, layer, x, tensors, added)


def attention_of(
    case: Case, layer: nn.Module, x: Tensor, tensors: dict[str, Tensor], added: oracle.Projected
) -> Tensor:
    """The output of an attention with the trained biases and what is added to each map."""
    W = oracle.attention_weights(layer)
    own = {n: p.detach().double() for n, p in layer.named_parameters() if "adapter" not in n}
    own |= {n.removesuffix(".trained"): t for n, t in tensors.items() if n.endswith(".trained")}
    biases: dict[str, Tensor] = {}
    if "in_proj_bias" in own:
        parts = (*own["in_proj_bias"].chunk(3), own["out_proj.bias"])
        biases = dict(zip(W, parts, strict=True))
    given = (x, x, x) if case.call is with_itself else (x, *others(layer, x))
    turned = {id(g): g if layer.batch_first else g.transpose(0, 1) for g in given}
    beyond = [own[name] for name in ("bias_k", "bias_v") if name in own]

    def project(slot: str, x: Tensor) -> Tensor:
        return oracle.linear(layer, x, W[slot], biases.get(slot)) + added(slot, x)

    y = oracle.attention(layer, [turned[id(g)] for g in given], project, beyond)
    return y if layer.batch_first else y.transpose(0, 1)


def delta_of(setting: Setting, layer: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """ΔW of one slot as a whole weight, zero beside the slot."""
    case = setting.case
    if setting.method == "lora":
        return case.learned(layer, tensors, setting.scale)
    W = layer.dense().detach().double()
    axis = 1 if case.file in ("embedding", "conv1d") else 0
    (magnitude,) = (t for k, t in tensors.items() if k.endswith("magnitude_vector"))
    if case.file == "conv_transpose":
        delta = case.learned(layer, tensors, setting.scale)
        return oracle.transposed_conv_dora(layer, W, delta, magnitude)
    if case.enabled:
        first = int(next(iter(tensors))[6]) * len(magnitude)
        rows = torch.arange(first, first + len(magnitude))
        delta = case.learned(layer, tensors, setting.scale).index_select(axis, rows)
        part = oracle.dora_delta(layer, W.index_select(axis, rows), delta, magnitude, axis)
        return torch.zeros_like(W).index_copy(axis, rows, part)
    unpadded = copy.copy(layer)
    unpadded.__dict__["padding_idx"] = None
    delta = case.learned(unpadded, tensors, setting.scale)
    found = oracle.dora_delta(layer, W, delta, magnitude, axis)
    padding = getattr(layer, "padding_idx", None)
    if padding is None:
        return found
    return found.index_fill(0, torch.tensor([padding]), 0.0)


def slots(case: Case) -> list[str]:
    """The slots of a state."""
    if case.file == "attention":
        marks = case.enabled or (True,) * 4
        return [f"{slot}." for slot, on in zip(("q", "k", "v", "out"), marks, strict=True) if on]
    return [f"slice_{i}." for i, on in enumerate(case.enabled) if on] or ["weight."]


def lora_bias(setting: Setting, tensors: dict[str, Tensor], y: Tensor) -> Tensor:
    """s times the bias on B, at the rows it belongs to, shaped for the output."""
    case = setting.case
    biases = {k: t for k, t in tensors.items() if k.endswith("lora_B_bias")}
    if not biases:
        return torch.zeros((), dtype=torch.float64)
    axis = 1 if case.file.startswith("conv") and case.file != "conv1d" else -1
    total = torch.zeros(y.shape[axis], dtype=torch.float64)
    for key, bias in biases.items():
        start = int(key[6]) * len(bias) if case.enabled else 0
        total = torch.cat(
            (total[:start], total[start : start + len(bias)] + bias, total[start + len(bias) :])
        )
    return setting.scale * (total.view(-1, *[1] * (y.dim() - 2)) if axis == 1 else total)


def inputs(setting: Setting, x: Tensor, training: bool) -> list[Tensor]:
    """What each slot's adapter sees: with dropout, one mask for all of them."""
    if setting.case.file == "attention":  # which draws as it goes
        return []
    if training and setting.dropout and x.is_floating_point():
        x = x * keep_mask(x, setting.dropout) / (1 - rounded(setting.dropout))
    return [x] * len(slots(setting.case))


def forward_is_the_oracles(setting: Setting, training: bool = False) -> None:
    """In the dtype of the setting, without gradients and with them."""
    model = fill(adapt(base(setting), setting)).train(training)
    x = setting.case.x(setting.dtype)
    torch.manual_seed(11)
    dropped = [d.double() if d.is_floating_point() else d for d in inputs(setting, x, training)]
    wide = x.double() if x.is_floating_point() else x
    y = expected(setting, model, wide, leaves(model), dropped)
    for graded in (False, True):
        torch.manual_seed(11)
        with torch.set_grad_enabled(graded):
            slack = max(TOLERANCE[setting.dtype], setting.case.slack)
            close(setting.case.call(model.layer, x), y, slack)


def gradients_are_the_oracles(setting: Setting) -> None:
    """In float64, of the input and of every tensor of the adapter, with the same dropout masks."""
    setting = setting.but(dtype=torch.float64, head=False)
    model = fill(adapt(base(setting), setting)).train()
    x = setting.case.x(torch.float64)
    ours = x.clone().requires_grad_() if x.is_floating_point() else x
    theirs = x.double().clone().requires_grad_() if x.is_floating_point() else x
    tensors = leaves(model)
    torch.manual_seed(12)
    y = setting.case.call(model.layer, ours)
    torch.manual_seed(12)
    z = expected(setting, model, theirs, tensors, inputs(setting, theirs, training=True))
    close(y, z, 1e-12)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights + y * y).sum().backward()
    (z * weights + z * z).sum().backward()
    if x.is_floating_point():
        close(ours.grad, theirs.grad, 1e-11)
    names = {
        n.replace("adapter.default.", ""): p
        for n, p in model.layer.named_parameters()
        if "adapter.default." in n
    }
    trained = [key for key in tensors if key.startswith(tuple(slots(setting.case)))]
    trained += [key for key in tensors if key.endswith(".trained")]
    assert len(names) == len({key for key in trained if ".start_" not in key})
    for name, parameter in names.items():
        slot, _, tensor = name.partition(".")
        found = tensors[f"{slot.partition('_of_')[0]}.{tensor}"].grad
        grad = parameter.grad
        if setting.case.form == "spanning" and tensor == "lora_B":
            found = oracle.spread_rows(model.layer, found)
        close(grad, found.reshape(grad.shape), 1e-11)


def fast_is_default(setting: Setting) -> None:
    """The update that a method gives by its factors is the one derived from `merged`."""
    setting = setting.but(dtype=torch.float64, head=False)
    layer = fill(adapt(base(setting), setting)).train().layer
    for slot, adapter, _ in layer.contributors():
        fast = adapter(lambda slot=slot: layer.matrix(slot))
        slow = Adapter.forward(adapter, lambda slot=slot: layer.matrix(slot))
        assert isinstance(slow, Dense)
        if isinstance(fast, Rescaled):
            M = fast.matrix(layer.matrix(slot))
        else:
            M = fast.scale * fast.B @ fast.A if isinstance(fast, LowRank) else fast.M
        close(M, slow.M, 1e-12)
        assert (fast.shift is None) == (slow.shift is None)
        if fast.shift is not None:
            assert torch.equal(fast.shift, slow.shift)


@contextmanager
def plain_steps(factors: bool = True) -> Iterator[None]:
    """Without kernels; without factors too, every ΔW is formed as a matrix."""
    with pytest.MonkeyPatch.context() as patch:
        for geometry in geometries():
            patch.setattr(geometry, "fused", lambda self, x, parts: None)
        if not factors:
            for method in (LoraAdapter, *LoraAdapter.__subclasses__()):
                patch.setattr(method, "forward", Adapter.forward)
        yield


def kernel_is_the_plain_steps(setting: Setting, factors: bool = True) -> None:
    """Output and all gradients, with the same dropout mask."""
    setting = setting.but(dtype=torch.float64, head=False)
    model = fill(adapt(base(setting), setting)).train()
    names, held = zip(*model.layer.adapter.named_parameters(), strict=True)
    found = []
    for steps in (nullcontext(), plain_steps(factors)):
        x = setting.case.x(torch.float64)
        x = x.requires_grad_() if x.is_floating_point() else x
        with steps:
            torch.manual_seed(13)
            y = setting.case.call(model.layer, x)
            weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
            leaves_ = [x, *held] if x.requires_grad else held
            found.append((y, *torch.autograd.grad((y * weights + y * y).sum(), leaves_)))
    inside = [torch.ones(()), torch.ones(())] if x.requires_grad else [torch.ones(())]
    # B of a spanning convolution is zero off its groups, and stays so
    inside += [p != 0 for p in held]
    labels = [""] * (len(inside) - len(held)) + list(names)
    for name, fast, slow, mask in zip(labels, *found, inside, strict=True):
        # softmax takes no notice of a bias of keys: its gradient is nothing but rounding
        nothing = setting.case.file == "attention" and name.endswith(".k.lora_B_bias")
        close(fast * mask, slow * mask, 1e-11 if nothing else 1e-12)


def forward_is_the_plain_layers(setting: Setting) -> None:
    """A plain layer whose weight is `merged(W)` gives the output, whatever the method."""
    setting = setting.but(dtype=torch.float64, head=False, bias="none", lora_bias=False)
    model = fill(adapt(base(setting), setting))
    plain = unpacked(base(setting), setting)
    layer = model.layer
    with torch.no_grad():
        for slot, adapter, _ in layer.contributors():
            W = layer.matrix(slot)
            weight = plain.layer.get_parameter(layer.holder(slot))
            weight.add_(layer.layout(adapter.merged(W) - W, slot))
        x = setting.case.x(torch.float64)
        slack = max(1e-12, setting.case.slack)
        close(setting.case.call(layer, x), setting.case.call(plain.layer, x), slack)


def known(setting: Setting) -> bool:
    """Leave out the methods whose equation the oracle does not know."""
    return setting.method in ("lora", "dora")


def low_rank(setting: Setting) -> bool:
    """Leave out what has no ΔW."""
    return setting.case.form != "module"


@over_pairs(known)
def test_forward(setting: Setting) -> None:
    forward_is_the_oracles(setting)
    if setting.dropout:
        forward_is_the_oracles(setting, training=True)


@over_pairs(lambda s: low_rank(s) and s.mergeable)
def test_plain_layer(setting: Setting) -> None:
    forward_is_the_plain_layers(setting)


@over_pairs(known)
def test_gradients(setting: Setting) -> None:
    gradients_are_the_oracles(setting)


@over_pairs(low_rank)
def test_factors_are_the_default_update(setting: Setting) -> None:
    fast_is_default(setting)


@over_pairs(low_rank)
def test_kernels_are_the_plain_steps(setting: Setting) -> None:
    kernel_is_the_plain_steps(setting)
    kernel_is_the_plain_steps(setting, factors=False)


@over_cases(lambda case: case.form not in ("module", "parameter"))
def test_each_geometry_has_a_kernel(case: Case) -> None:
    """But for those whose ΔW must be formed, or whose padding is not zeros."""
    model = fill(adapt(base(Setting(case)), Setting(case)))
    layer = model.layer
    assert isinstance(layer, AdaptedLayer)
    output = layer.fused(case.x(torch.float32), layer.contributions())
    padding = getattr(layer, "padding_mode", "zeros")
    formed = case.form == "factored" or padding != "zeros" or case.name == "conv1d-same"
    plain = case.file in ("attention", "conv_transpose")
    assert (output is None) == (formed or plain)


@pytest.mark.slow
@over_cases()
def test_oracle_everywhere(case: Case) -> None:
    whole_product(case, forward_is_the_oracles, known)
    narrow = {"dtype": torch.float64, "head": False}
    whole_product(case, gradients_are_the_oracles, lambda s: known(s) and s == s.but(**narrow))


def gradcheck_holds(case: Case) -> None:
    """Against finite differences, on the odd shapes of the case."""
    s = Setting(case, dtype=torch.float64, lora_bias=case.file in ("linear", "conv1d", "conv"))
    model = fill(adapt(base(s), s))
    held = [p for a in parts(model) for p in a.parameters()]
    x = case.x(torch.float64)

    def output(*tensors: Tensor) -> Tensor:
        return case.call(model.layer, tensors[0] if x.is_floating_point() else x)

    first = [x.clone().requires_grad_()] if x.is_floating_point() else []
    assert torch.autograd.gradcheck(output, (*first, *held), fast_mode=True)


@over_cases(lambda case: case.name != "embedding-max-norm" and not case.packed)
def test_gradcheck(case: Case) -> None:
    gradcheck_holds(case)


def weighted_sum_is_the_oracles(case: Case) -> None:
    """Two adapters of other ranks and seeds: ΔW = Σ weight ΔW, and nothing of the third."""
    s = Setting(case, dtype=torch.float64, bias="all" if case.form == "config" else "none")
    model = base(s)
    wide = s.but(rank=(1, 7.0)) if case.form != "module" else s
    for name, own, seed in (("a", s, 5), ("b", wide, 6), ("c", s, 7)):
        fill(adapt(model, own, name, seed), name, seed)
    deltaw.activate(model, {"a": 0.75, "b": -2.0})
    x = case.x(torch.float64)
    plain = leaves_of_base(model)
    total: dict[str, Tensor] = {}
    for name, weight in (("a", 0.75), ("b", -2.0)):
        for key, t in leaves(model, name).items():
            if key.endswith(".trained"):
                old = plain[key.removesuffix(".trained")]
                total[key] = total.get(key, old) + weight * (t - old)
    if case.form == "module":
        y = expected(s, model, x, total, [])
    else:
        y = with_deltas(s, wide, model, x, total)
    with torch.no_grad():
        close(case.call(model.layer, x), y, max(1e-12, case.slack))


def leaves_of_base(model: nn.Module) -> dict[str, Tensor]:
    """The layer's own tensors."""
    held = {k: p for k, p in model.layer.named_parameters() if "adapter" not in k}
    if "weight" in held:
        held["weight"] = model.layer.dense()
    return {k: p.detach().double() for k, p in held.items()}


def with_deltas(
    s: Setting, wide: Setting, model: nn.Module, x: Tensor, trained: dict[str, Tensor]
) -> Tensor:
    """The base product and both low-rank parts."""
    case, layer = s.case, model.layer
    x = x.double() if x.is_floating_point() else x
    own = leaves_of_base(model)
    if case.file == "attention":
        deltas = [
            (weight, oracle.attention_deltas(leaves(model, name), setting_.scale))
            for name, setting_, weight in (("a", s, 0.75), ("b", wide, -2.0))
        ]

        def added(slot: str, x: Tensor) -> Tensor:
            parts = [w * oracle.linear(layer, x, d[slot], None) for w, d in deltas if slot in d]
            return sum(parts, torch.zeros((), dtype=torch.float64))

        return attention_of(case, layer, x, trained, added)
    W = oracle.spread(layer, own["weight"]) if case.form == "spanning" else own["weight"]
    y = case.apply(layer, x, W, trained.get("bias.trained", own.get("bias")))
    for name, setting_, weight in (("a", s, 0.75), ("b", wide, -2.0)):
        delta = case.learned(layer, leaves(model, name), setting_.scale)
        y = y + weight * case.apply(layer, x, delta, None)
    return y


def attention_under_a_mask() -> None:
    """Of what is masked nothing is seen: the queries that see one key alone give its value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(6, 3)).double()
    deltaw.attach(model, deltaw.LoraConfig(r=2, lora_alpha=3))
    layer = fill(model)[0]
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    mask = torch.ones(4, 4).triu(1).bool()
    padding = torch.tensor([[False, False, True, True], [False, True, True, True]])
    W = oracle.attention_weights(layer)
    deltas = oracle.attention_deltas(deltaw.capture(model).layers["0"].tensors, 3 / 2)
    value = x[0] @ (W["v"] + deltas["v"]).T @ (W["out"] + deltas["out"]).T
    for weights in (False, True):
        y, _ = layer(x, x, x, attn_mask=mask, need_weights=weights)
        close(y[0], value, 1e-12)
        y, _ = layer(x, x, x, key_padding_mask=padding, need_weights=weights)
        close(y[:, 1], value[1].expand(4, -1), 1e-12)


def encoders_agree_without_gradients() -> None:
    """torch then has a path on which no layer's forward runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for targets in (["linear1", "linear2"], ["self_attn"]):
        deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=targets))
        fill(model)
        y = model(x.clone().requires_grad_())
        with torch.no_grad():
            close(model(x), y, 1e-12)
        deltaw.detach(model)


def test_encoders_without_gradients() -> None:
    encoders_agree_without_gradients()


def test_attention_under_a_mask() -> None:
    attention_under_a_mask()


@over_cases()
def test_weighted_sums(case: Case) -> None:
    weighted_sum_is_the_oracles(case)


@given(
    out=st.integers(1, 7),
    into=st.integers(1, 7),
    r=st.integers(1, 9),
    alpha=st.floats(0.25, 40),
    rslora=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_linear_of_drawn_shapes(out, into, r, alpha, rslora, batch, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(into, out)).double()
    deltaw.attach(model, deltaw.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora))
    fill(model, seed=seed)
    state = deltaw.capture(model).layers["0"].tensors
    x = torch.randn(*batch, into, generator=generator, dtype=torch.float64)
    scale = alpha / (r**0.5 if rslora else r)
    W = model[0].weight + oracle.linear_delta(model[0], state, scale)
    close(model(x), oracle.linear(model[0], x, W, model[0].bias), 1e-11)


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 3),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    r=st.integers(1, 3),
)
@settings(max_examples=40)
def test_convolutions_of_drawn_shapes(
    dims, groups, widths, kernel, stride, dilation, padding, mode, r
) -> None:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    layer = kinds[dims](
        groups * widths[0],
        groups * widths[1],
        kernel,
        stride,
        padding,
        dilation,
        groups,
        padding_mode=mode,
    )
    model = nn.Sequential(layer).double()
    deltaw.attach(model, deltaw.LoraConfig(r=r, lora_alpha=5, target_modules=["0"]))
    fill(model)
    x = torch.randn(2, layer.in_channels, *range(5, 5 + dims), dtype=torch.float64)
    delta = oracle.conv_delta(layer, deltaw.capture(model).layers["0"].tensors, 5 / r)
    W = layer.weight + delta
    close(model(x), oracle.convolution(layer, x, W, layer.bias), 1e-11)


def test_the_oracle_is_torchs_own_layer() -> None:
    """The oracle itself, without an adapter, against torch."""
    for case in (case for case in CASES if not case.packed):
        s = Setting(case, dtype=torch.float64)
        layer = base(s).layer
        own = {k: p.detach() for k, p in layer._parameters.items() if p is not None}
        W = oracle.spread(layer, own["weight"]) if case.form == "spanning" else own.get("weight")
        x = case.x(torch.float64)
        if case.file == "attention":
            zero = torch.zeros((), dtype=torch.float64)
            y = attention_of(case, layer, x, {}, lambda slot, x, zero=zero: zero)
        else:
            y = case.apply(layer, x, W, own.get("bias"))
        close(case.call(layer, x), y, 1e-12)


def test_arguments_pass_through() -> None:
    s = setting("linear")
    model = fill(adapt(base(s), s))
    x = s.case.x(s.dtype)
    assert torch.equal(model.layer(x), model.layer(input=x))
    assert loss(model, s).isfinite()
