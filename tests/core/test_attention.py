"""`nn.MultiheadAttention` and torch's encoders under adapters, with all that a call can ask for."""

import copy
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from core.models import shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import deltaw
from deltaw import LoraConfig
from deltaw.encoders import Stepwise
from deltaw.errors import ConfigError, StateError, TargetError

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "without bias": {"bias": False},
    "longer keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own widths": {"kdim": 5, "vdim": 7},
}
LENGTH, BATCH, WIDTH, HEADS = 3, 4, 6, 2
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Attending(nn.Module):
    """An attention in a model, frozen: torch's bits of a transposed input depend on that."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
        for name, parameter in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        self.requires_grad_(False)
        self.eval()

    def forward(self, *inputs: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        """Attend."""
        return self.attention(*inputs, **options)


def inputs_of(model: Attending, batched: bool = True) -> list[tuple[Tensor, ...]]:
    """Self-attention, equal keys and values, and three inputs, as far as the widths allow."""
    attention = model.attention
    first = (BATCH, LENGTH) if attention.batch_first else (LENGTH, BATCH)
    shape = first if batched else (LENGTH,)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        for width in (WIDTH, attention.kdim, attention.vdim)
    )
    same = attention.kdim == attention.vdim
    return [(q, k, v), *([(q, q, q), (q, k, k)] if same else [])]


def options_of(batched: bool = True) -> Iterator[dict[str, object]]:
    """All masks, with and without weights."""
    padding = torch.zeros(BATCH, LENGTH).bool()
    padding[1, 1:] = True
    padding = padding if batched else padding[1]
    causal = torch.ones(LENGTH, LENGTH).triu(1).bool()
    deep = torch.zeros((BATCH if batched else 1) * HEADS, LENGTH, LENGTH, dtype=torch.float64)
    deep[1::3, :, 0] = -2.5
    for weights, pad, mask in itertools.product(
        (False, True), (None, padding), (None, causal, deep)
    ):
        given = {
            "need_weights": weights,
            "average_attn_weights": pad is None,
            "key_padding_mask": pad if mask is not deep or pad is None else pad.double() * -3,
            "attn_mask": mask,
        }
        yield given
        if mask is causal:
            yield given | {"is_causal": True}


def merged_twin(model: Attending) -> Attending:
    """The plain model with the adapters in its weights."""
    twin = copy.deepcopy(model)
    deltaw.merge(twin, original="none")
    deltaw.detach(twin)
    return twin


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_can_be_asked_for(kind: str, batch_first: bool) -> None:
    """Bit for bit at the start, and then that of the weights W + ΔW, each ΔW counted once."""
    plain = Attending(**KINDS[kind], batch_first=batch_first)
    model = copy.deepcopy(plain)
    deltaw.attach(model, LoraConfig(r=2, lora_alpha=3))
    trained = copy.deepcopy(model)
    shake(trained)
    twin = merged_twin(trained)
    for batched in (True, False):
        for inputs, options in itertools.product(inputs_of(plain, batched), options_of(batched)):
            inputs = tuple(x.clone() for x in inputs) if inputs[1] is inputs[0] else inputs
            y, weights = plain(*inputs, **options)
            z, others = model(*inputs, **options)
            assert torch.equal(y, z), options
            assert weights is others is None or torch.equal(weights, others)
            y, weights = twin(*inputs, **options)
            z, others = trained(*inputs, **options)
            torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
            assert weights is others is None or torch.allclose(weights, others, atol=1e-12)


def test_the_same_input_is_projected_at_once_as_torch_does() -> None:
    model = Attending()
    deltaw.attach(model, LoraConfig(r=2))
    ((q, _, _), same, _) = inputs_of(model)
    with torch.no_grad():
        for x in (same, (q.clone(),) * 3):
            with deltaw.disabled(model):
                expected = model(*x)[0]
            assert torch.equal(model(*x)[0], expected)


@NESTED
def test_nested_tensors_are_refused_under_an_adapter() -> None:
    model = Attending(batch_first=True)
    deltaw.attach(model, LoraConfig(r=2))
    x = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)])
    with torch.no_grad(), pytest.raises(StateError, match=r"fast path.*\nFix: .*key_padding_mask"):
        model(x, x, x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_under_adapters_of_their_own(batch_first: bool) -> None:
    model = Attending(batch_first=batch_first)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, LoraConfig(r=seed + 1, bias="lora_only"), name)
        shake(model, seed=seed)
    names = ["a", None, "b", "a"]
    for inputs, options in itertools.product(inputs_of(model), options_of()):
        expected: dict[str | None, tuple[Tensor, Tensor | None]] = {}
        for name in ("a", "b", None):
            deltaw.activate(model, name)
            expected[name] = model(*inputs, **options)
        with deltaw.rows(model, names):
            y, weights = model(*inputs, **options)
        for row, name in enumerate(names):
            at = (row,) if batch_first else (slice(None), row)
            torch.testing.assert_close(y[at], expected[name][0][at], rtol=1e-10, atol=1e-12)
            if weights is not None:
                torch.testing.assert_close(weights[row], expected[name][1][row])


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_compiled_are_one_graph(batch_first: bool) -> None:
    torch._dynamo.reset()
    model = Attending(batch_first=batch_first)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, LoraConfig(r=seed + 1, bias="lora_only"), name)
        shake(model, seed=seed)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    q, k, v = inputs_of(model)[0]
    with torch.no_grad():
        for names in (["a", None, "b", "a"], ["a", "b", "b", "b"], [None, "a", None, "b"]):
            with deltaw.rows(model, names):
                for found, expected in zip(compiled(q, k, v), model(q, k, v), strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1


def test_rows_that_cannot_be_told_apart() -> None:
    model = Attending()
    deltaw.attach(model, LoraConfig(r=2), "a")
    for inputs in (inputs_of(model, batched=False)[0], inputs_of(model)[0]):
        with (
            pytest.raises(StateError, match=r"attention got (no|4) rows, and 3 rows"),
            deltaw.rows(model, ["a", None, None]),
        ):
            model(*inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_does_not_go_with_the_weights(kind: str) -> None:
    model = Attending(**KINDS[kind])
    deltaw.attach(model, LoraConfig(r=2))
    inputs = [x.float() for x in inputs_of(model)[0]]
    with pytest.raises(StateError, match=r"torch.float32 on cpu:\n  - (in|q)_proj_weight is .*64"):
        model(*inputs)


def test_a_bias_of_the_adapter_meets_a_trained_bias_of_the_output() -> None:
    """Two adapters of one parameter, of the attention and of its child, are merged as one."""
    model = Attending()
    deltaw.attach(model, LoraConfig(r=2, lora_bias=True, bias="all"))
    shake(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = inputs_of(model)[1]
    expected = model(*x)[0]
    with deltaw.merged(model):
        torch.testing.assert_close(model(*x)[0], expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(*x)[0], expected)


def test_a_tied_output_projection_is_not_merged_in_silence() -> None:
    model = Attending()
    model.twin = nn.Linear(WIDTH, WIDTH).double()
    model.twin.weight = model.attention.out_proj.weight
    deltaw.attach(model, LoraConfig(r=2, target_modules=["attention"]))
    shake(model)
    before = model.twin.weight.clone()
    with pytest.raises(deltaw.errors.MergeError, match=r"out_proj\.weight is tied to twin\.weight"):
        deltaw.merge(model)
    deltaw.merge(model, untie=True)
    assert torch.equal(model.twin.weight, before)
    deltaw.unmerge(model)
    assert model.twin.weight is model.attention.out_proj.weight


def test_plan_and_summary_count_every_slot_once() -> None:
    model = Attending(kdim=5, vdim=7)
    flags = {"attention": [True, False, True, True]}
    made = deltaw.attach(model, LoraConfig(r=2, enable_lora=flags, bias="lora_only"))
    assert made.targets[0].slots == ("q", "v", "out")
    trained = 2 * (6 + 6) + 2 * (6 + 7) + 2 * (6 + 6) + 3 * 6 + 6
    assert made.parameters == trained == deltaw.summary(model).trainable
    assert deltaw.summary(model).adapted == ("attention",)


def test_a_base_with_another_output_projection_is_another_base(tmp_path) -> None:
    model = Attending()
    deltaw.attach(model, LoraConfig(r=2))
    deltaw.save(model, tmp_path)
    other = Attending()
    deltaw.load(other, tmp_path)
    deltaw.detach(other)
    with torch.no_grad():
        other.attention.out_proj.weight.mul_(2)
    with pytest.raises(deltaw.errors.FormatError, match="other weights"):
        deltaw.load(other, tmp_path)


class Quantised(nn.Linear):
    """An output projection that computes otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return something else."""
        return super().forward(x).round()


def test_weights_that_are_no_parameters_are_refused() -> None:
    model = Attending()
    nn.utils.parametrizations.weight_norm(model.attention, "in_proj_weight")
    with pytest.raises(TargetError, match="attention: one of its weights is computed"):
        deltaw.attach(model, LoraConfig(target_modules=["attention"]))
    model = Attending()
    model.attention.out_proj = Quantised(WIDTH, WIDTH).double()
    with pytest.raises(TargetError, match="attention: its out_proj is a Quantised"):
        deltaw.attach(model, LoraConfig(target_modules=["attention"]))


class Encoding(nn.Module):
    """A model with an encoder that torch has a fast path for."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        """Encode, with padding."""
        return self.head(self.encoder(x, src_key_padding_mask=src_key_padding_mask))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
PAD = torch.zeros(3, 5).bool()
PAD[0, 3:] = True


def encoded(model: nn.Module) -> Tensor:
    """The output at what is not padding, without gradients."""
    with torch.no_grad():
        return model(X, src_key_padding_mask=PAD)[~PAD]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran on torch's fast path."""
    ran: list[str] = []
    for name in (
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_nested_tensor_from_mask",
    ):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *of, n=name, real=real, **by: ran.append(n) or real(*of, **by)
        )
    return ran


TARGETS = {"linear layers": ["linear1", "linear2"], "attention": ["self_attn"], "all": "all-linear"}


@NESTED
@pytest.mark.parametrize("root", [False, True], ids=["inside", "root"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_encoders_leave_the_fast_path_for_adapters_in_force_alone(
    targets: object, root: bool, fast: list[str]
) -> None:
    model = Encoding().encoder if root else Encoding()
    before = {path: type(m) for path, m in model.named_modules()}
    base = encoded(model)
    assert fast == ["_nested_tensor_from_mask", *["_transformer_encoder_layer_fwd"] * 2]
    deltaw.attach(model, LoraConfig(r=2, target_modules=targets))
    fast.clear()
    torch.testing.assert_close(encoded(model), base)
    assert fast == []
    deltaw.verify(model, {"src" if root else "x": X, "src_key_padding_mask": PAD})
    shake(model)
    fast.clear()
    adapted = encoded(model)
    torch.testing.assert_close(model(X, src_key_padding_mask=PAD)[~PAD], adapted)
    assert fast == []
    assert not torch.allclose(adapted, base, atol=1e-2)
    with deltaw.merged(model):
        torch.testing.assert_close(encoded(model), adapted, rtol=1e-4, atol=1e-5)
    with deltaw.disabled(model):
        assert torch.equal(encoded(model), base)
    assert len(fast) == 6
    fast.clear()
    with torch.no_grad(), deltaw.rows(model, ["default", None, "default"]):
        y = model(X, src_key_padding_mask=PAD)[~PAD]
    torch.testing.assert_close(y[:3], adapted[:3])
    torch.testing.assert_close(y[3:8], base[3:8])
    assert fast == []
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(encoded(made), adapted)
    deltaw.detach(model)
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert torch.equal(encoded(model), base)


@NESTED
def test_an_adapter_elsewhere_leaves_the_fast_path(fast: list[str]) -> None:
    model = Encoding()
    base = encoded(model)
    deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]), "head")
    deltaw.attach(model, LoraConfig(r=2, target_modules=["self_attn"]), "encoder")
    shake(model)
    fast.clear()
    assert not torch.equal(encoded(model), base)
    assert len(fast) == 3
    deltaw.activate(model, {"head": 1.0, "encoder": 1.0})
    encoded(model)
    assert len(fast) == 3
    deltaw.detach(model, "encoder")
    encoded(model)
    assert len(fast) == 6


def test_nothing_global_is_changed_even_by_an_error() -> None:
    model = Encoding()
    deltaw.attach(model, LoraConfig(r=2))
    with torch.no_grad(), pytest.raises(Exception, match=r"[Ee]xpected|shapes"):
        model(torch.cat((X, X), -1), PAD)
    assert torch.backends.mha.get_fastpath_enabled()
    switches = [vars(m).get("activation_relu_or_gelu") for m in model.encoder.layers]
    assert switches == [1, 1] and vars(model.encoder)["use_nested_tensor"]


def test_an_encoder_with_a_trained_bias_of_its_own_steps_too(fast: list[str]) -> None:
    class Biased(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(8, 2, 16, batch_first=True)
            self.own_bias = nn.Parameter(torch.zeros(8))

    model = nn.Sequential(Biased()).eval()
    deltaw.attach(model, LoraConfig(r=2, bias="all"))
    shake(model)
    with torch.no_grad():
        y = model(X)
    assert fast == []
    torch.testing.assert_close(model(X).detach(), y)
    deltaw.detach(model)
    assert type(model[0]) is Biased and not isinstance(model[0], Stepwise)


@pytest.mark.slow
@NESTED
def test_one_graph_with_encoders() -> None:
    torch._dynamo.reset()
    model = Encoding(layers=1)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, LoraConfig(r=2), name)
        shake(model, seed=seed)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for which in ("a", "b", {"a": 0.5, "b": 2.0}):
        deltaw.activate(model, which)
        torch.testing.assert_close(encoded(compiled), encoded(model))


def test_an_output_size_is_that_of_the_adapter_too() -> None:
    """Of a transposed convolution, where several sizes fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)).double().eval()
    deltaw.attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    shake(model)
    twin = copy.deepcopy(model)
    deltaw.merge(twin)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    for size in ([9, 5], [10, 6], [10, 5]):
        y = model[0](x, size)
        assert y.shape[2:] == tuple(size)
        torch.testing.assert_close(y, twin[0](x, output_size=size), rtol=1e-10, atol=1e-12)
    assert model[0].output_padding == (0, 0)
    one = model[0](x[0])
    torch.testing.assert_close(one, model[0](x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_starts_from_data_are_refused(init: str) -> None:
    model = nn.Sequential(nn.MultiheadAttention(6, 3))
    config = LoraConfig(r=2, init_lora_weights=init)
    with pytest.raises(ConfigError, match=r"0: what the projections .* is not seen"):
        deltaw.attach(model, config, data=[torch.randn(2, 3, 6)], loss=lambda model, x: x.sum())


def test_the_share_that_rounding_takes_is_the_largest_of_all_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(32, 2)).bfloat16()
    deltaw.attach(model, LoraConfig(r=2))
    shake(model)
    with torch.no_grad():
        model[0].adapter["default"]["out"].lora_B.mul_(1e-3)
    found = deltaw.merge(model).rounding["0"]
    deltaw.unmerge(model)
    with torch.no_grad():
        model[0].adapter["default"]["out"].lora_B.mul_(1e3)
    assert found > 5 * deltaw.merge(model).rounding["0"]
