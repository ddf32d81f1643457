"""What kernels promise beside law 3: what they keep and share, and where they step back."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw import kernels
from deltaw.kernels import dropout, shared
from deltaw.layer import AdaptedLayer
from laws.building import adapt, base, fill
from laws.product import Setting, setting
from laws.test_law03_oracle import close, plain_steps


class Readers(nn.Module):
    """Three layers that read one input, as q, k and v do."""

    def __init__(self, *widths: int, into: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(into, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def readers(p: float = 0.0, dtype: torch.dtype = torch.float64, **options: object) -> Readers:
    """With an adapter that does something, in training."""
    torch.manual_seed(0)
    model = Readers(7, 3, 4).to(dtype)
    deltaw.attach(model, deltaw.LoraConfig(r=3, lora_alpha=5, lora_dropout=p, **options))
    return fill(model).train()


def leaf(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 2, 30, dtype=dtype).view(2, 3, 5).requires_grad_()


def held(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) + y * y).sum()


def shared_gradient_is_the_sum(p: float = 0.0) -> None:
    """Of an input with several readers, with the same masks."""
    found = []
    for steps in (nullcontext(), plain_steps()):
        model, x = readers(p), leaf()
        with steps:
            torch.manual_seed(3)
            y = model(x)
            found.append(torch.autograd.grad(loss(y) + (x**3).sum(), [x, *held(model)]))
    for fast, slow in zip(*found, strict=True):
        close(fast, slow, 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_gradient_of_a_shared_input(p: float) -> None:
    shared_gradient_is_the_sum(p)


def test_a_graph_can_be_walked_twice_and_in_parts() -> None:
    model, x = readers(), leaf()
    y = model(x)
    whole = torch.autograd.grad(loss(y), [x, *held(model)], retain_graph=True)
    again = torch.autograd.grad(loss(y), [x, *held(model)], retain_graph=True)
    alone = torch.autograd.grad(loss(y), held(model), retain_graph=True)
    first = torch.autograd.grad(y[..., :7].sum(), x, retain_graph=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], alone, strict=True))
    with plain_steps():
        close(first, torch.autograd.grad(model(x)[..., :7].sum(), x)[0], 1e-12)


def test_a_pass_that_broke_off_leaves_nothing() -> None:
    model, x = readers(), leaf()
    y = model(x)
    expected = torch.autograd.grad(loss(y), x, retain_graph=True)[0]

    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    hook = model.layers[0].adapter["default"]["weight"].lora_A.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(loss(y), [x, *held(model)], retain_graph=True)
    hook.remove()
    assert torch.equal(torch.autograd.grad(loss(y), x)[0], expected)


@contextmanager
def drawn() -> Iterator[list[Tensor]]:
    """The masks that are drawn within the block."""
    masks: list[Tensor] = []
    real = dropout.keep_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "keep_mask", lambda x, p: masks.append(real(x, p)) or masks[-1])
        yield masks


def test_readers_of_one_input_share_a_mask() -> None:
    model, x = readers(0.25), leaf()
    with drawn() as masks:
        model(x)
        assert len(masks) == 1
        model(x)
        assert len(masks) == 2
        model(x.clone())
        assert len(masks) == 3
        model.eval()(x)
        assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])


REGIONS: dict[str, Callable[[Readers, Tensor, bool], Tensor]] = {
    "all": lambda m, x, kind: checkpoint(m, x, use_reentrant=kind),
    "the first": lambda m, x, kind: torch.cat(
        [checkpoint(m.layers[0], x, use_reentrant=kind), m.layers[1](x), m.layers[2](x)], -1
    ),
    "the last two": lambda m, x, kind: torch.cat(
        [m.layers[0](x), *(checkpoint(m.layers[i], x, use_reentrant=kind) for i in (1, 2))], -1
    ),
    "an input made inside": lambda m, x, kind: checkpoint(
        lambda x: m(torch.tanh(x)), x, use_reentrant=kind
    ),
}


def recomputation_draws_the_same_masks(region: str, reentrant: bool, passes: int = 1) -> None:
    """Whatever part of the readers is checkpointed, also with a second pass before backward."""
    model, x = readers(0.25), leaf()
    with drawn() as masks:
        total = sum(loss(REGIONS[region](model, x, reentrant)) for _ in range(passes))
        before = len(masks)
        total.backward()
    again = masks[before:]
    assert again
    assert all(any(torch.equal(mask, old) for old in masks[:before]) for mask in again)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_recomputation_draws_the_same_masks(region: str, reentrant: bool, passes: int) -> None:
    recomputation_draws_the_same_masks(region, reentrant, passes)


def test_gradients_of_a_checkpointed_part_with_dropout() -> None:
    """Against finite differences under fixed masks."""
    model = readers(0.25)
    x = leaf()

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(5)
        return REGIONS["an input made inside"](model, x, False)

    assert torch.autograd.gradcheck(output, (x, *held(model)), fast_mode=True)


def test_masks_have_the_distribution_of_dropout() -> None:
    """The share kept, of each element over passes and of each pass over elements, within 5 sigma;
    and no correlation between neighbours."""
    torch.manual_seed(0)
    x = torch.empty(64, 50)
    for p in (0.05, 0.1, 0.5, 0.9):
        masks = torch.stack([dropout.keep_mask(x, p) for _ in range(400)]).double()
        keep = 1 - dropout.rounded(p)
        assert set(masks.unique().tolist()) == {0.0, 1.0}
        sigma = (keep * (1 - keep)) ** 0.5
        assert abs(masks.mean() - keep) < 5 * sigma / masks.numel() ** 0.5
        for axis in ((0,), (1, 2)):
            means = masks.mean(axis)
            assert (means - keep).abs().max() < 5 * sigma / (masks.numel() / means.numel()) ** 0.5
        flat = (masks - keep).flatten()
        for lag in (1, 7, 8, 50):
            correlation = (flat[lag:] * flat[:-lag]).mean() / sigma**2
            assert abs(correlation) < 5 / flat.numel() ** 0.5


def test_p_is_honoured_to_one_256th() -> None:
    for p in torch.linspace(0.001, 0.999, 100).tolist():
        assert abs(dropout.rounded(p) - p) <= max(1 / 512, 1 / 256 - min(p, 1 - p)) + 1e-12
        assert 0 < dropout.rounded(p) < 1
    assert dropout.rounded(0.0) == 0.0


def test_the_expectation_is_that_without_dropout() -> None:
    model, x = readers(0.25), leaf()
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = torch.stack([model(x) for _ in range(3000)])
        expected = model.eval()(x)
    error = (outputs.mean(0) - expected).abs()
    assert (error < 5 * outputs.std(0) / 3000**0.5).all()


def test_the_mask_is_the_gradients_too() -> None:
    """What was dropped gets the base's gradient alone."""
    model, x = readers(0.5), leaf()
    with drawn() as masks:
        model(x).sum().backward()
    alone = torch.cat([layer.weight for layer in model.layers]).sum(0).expand(x.shape)
    kept = masks[0].bool()
    assert torch.allclose(x.grad[~kept], alone[~kept], atol=1e-14)
    assert not torch.isclose(x.grad[kept], alone[kept]).any()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """The bytes that autograd keeps for the backward pass, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def saved_bytes_are_the_least(dtype: torch.dtype, p: float = 0.0) -> None:
    """X once for all its readers and each one's S; with dropout a byte more per element of X."""
    model, x = readers(p, dtype), leaf(dtype)
    thin = 6 * 9 * x.element_size()
    mask = x.numel() if p else 0
    words = -(-mask // 8) * 8
    assert saved_bytes(model, x) == x.numel() * x.element_size() + thin + words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_what_linear_layers_keep(dtype: torch.dtype, p: float) -> None:
    saved_bytes_are_the_least(dtype, p)


def test_what_is_kept_under_autocast() -> None:
    """The input once in the dtype that is computed in, for all its readers."""
    model, x = readers(dtype=torch.float32), leaf(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(model, x) == 2 * x.numel() + 2 * 6 * 9


def test_frozen_factors_need_no_input() -> None:
    """With A frozen, S alone; with B frozen, X alone."""
    for frozen, expected in (("lora_A", 8 * 54), ("lora_B", 8 * 30)):
        model, x = readers(), leaf()
        for name, parameter in model.named_parameters():
            if name.endswith(frozen):
                parameter.requires_grad_(False)
        assert saved_bytes(model, x) == expected
        loss(model(x)).backward()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", lambda x, y: x + 6 * 3 * 2),
        ("fused-101", lambda x, y: x + 6 * 6 * 2 + 4 * (6 * 5 + 9 * 6)),
        ("embedding", lambda x, y: x + 15 * 3 * 2),
        ("conv1d", lambda x, y: x + y // 5 * 3),
        ("conv2d", lambda x, y: x + y // 5 * 3),
        ("conv2d-groups", lambda x, y: x + y // 6 * 3 * 2),
        ("spanning-conv1d", lambda x, y: x + y // 6 * 3 * 2),
    ],
)
def test_what_each_layer_keeps(name: str, expected: Callable[[int, int], int]) -> None:
    """The input and S, in the dtype of the base; besides, the joined factors of slices and the
    kernels of convolutions."""
    s = setting(name, dtype=torch.bfloat16)
    model = fill(adapt(base(s), s))
    x = s.case.x(s.dtype)
    y = model(x)
    factors = 0
    if "conv" in name:
        tensors = deltaw.capture(model).layers["layer"].tensors
        A, B = tensors["weight.lora_A"], tensors["weight.lora_B"]
        groups = model.layer.groups if "spanning" not in name else 1
        factors = 2 * (A.numel() * groups + B.numel())
    assert saved_bytes(model, x) == expected(x.nbytes, y.nbytes) + factors


def test_it_can_be_differentiated_twice() -> None:
    model, x = readers(lora_bias=True), leaf()

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradgradcheck(output, (x, *held(model)), fast_mode=True)
    gradient = torch.autograd.grad(loss(model(x)), x, create_graph=True)[0]
    with plain_steps():
        expected = torch.autograd.grad(loss(model(x)), x, create_graph=True)[0]
    found = torch.autograd.grad(gradient.square().sum(), held(model), allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), held(model), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("case", ["dropout", "autocast", "frozen A"])
def test_where_it_cannot_it_says_so(case: str) -> None:
    dtype = torch.float32
    model, x = readers(0.25 if case == "dropout" else 0.0, dtype), leaf(dtype)
    if case == "frozen A":
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = loss(model(x))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("name", ["embedding", "conv2d"])
def test_other_layers_say_that_they_cannot(name: str) -> None:
    s = Setting(setting(name).case, dtype=torch.float64)
    model = fill(adapt(base(s), s))
    for output in (loss(model(s.case.x(s.dtype))), model(s.case.x(s.dtype)).sum()):
        gradients = torch.autograd.grad(output, held(model), create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated twice.\nFix: .* by torch.func"):
            sum(g.sum() for g in gradients).backward()


def test_function_transforms_differentiate_a_convolution_twice() -> None:
    s = Setting(setting("conv2d").case, dtype=torch.float64)
    model, x = fill(adapt(base(s), s)), s.case.x(s.dtype)

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: loss(model(x)))(x).square().sum()

    with plain_steps():
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(model(leaf)), leaf, create_graph=True)[0]
        expected = torch.autograd.grad(gradient.square().sum(), leaf)[0]
    close(torch.func.grad(norm)(x), expected, 1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_function_transforms_take_the_plain_steps() -> None:
    model, x = readers(), leaf()
    with plain_steps():
        expected = torch.autograd.grad(loss(model(x)), x)[0]
    close(torch.func.grad(lambda x: loss(model(x)))(x.detach()), expected, 1e-12)
    each = torch.func.vmap(model)(x.detach())
    close(each, model(x), 1e-12)
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(lambda x: loss(model(x)), (x.detach(),), (tangent,))
    close(forward, expected.sum(), 1e-10)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        _, forward = torch.autograd.forward_ad.unpack_dual(loss(model(dual)))
    close(forward, expected.sum(), 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_takes_the_plain_steps() -> None:
    model, x = readers().eval(), leaf().detach()
    traced = torch.jit.trace(model, x, check_trace=False)
    assert "PythonOp" not in str(traced.inlined_graph)
    close(traced(x * 2), model(x * 2), 1e-12)


def test_the_reasons_are_told() -> None:
    x = torch.ones(2)
    assert kernels.why_not(x, nn.Parameter(x), None) == []
    fake = torch._subclasses.FakeTensorMode().from_tensor(x)
    assert kernels.why_not(x, fake) == []
    own = x.as_subclass(type("Own", (Tensor,), {}))
    assert "Own is a tensor of a kind of its own" in kernels.why_not(x, own)[0]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(mode: Callable[[], object]) -> None:
    model, x = readers().eval(), leaf()
    expected = model(x)
    with mode():
        y = model(x)
        model.train()(x)
    assert torch.equal(y, expected) and not y.requires_grad
    x = leaf()
    loss(model.eval()(x)).backward()
    assert x.grad is not None


def test_autocast_is_the_plain_steps() -> None:
    """In value and gradients; the inputs' gradients come back in float32."""
    found = []
    for steps in (nullcontext(), plain_steps()):
        model, x = readers(dtype=torch.float32), leaf(torch.float32)
        with steps, torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *held(model)])))
    for fast, slow in zip(*found, strict=True):
        assert fast.dtype == slow.dtype
        close(fast, slow, 2e-2)


@pytest.mark.parametrize("kind", ["trainable", "trained copy", "odd class"])
def test_bases_that_know_their_own_gradients(kind: str) -> None:
    """W that trains itself, or is replaced by another adapter's copy, or a class of its own."""

    class Doubled(nn.Linear):
        applies_weight = True

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(2 * x, self.weight / 2, self.bias)

    found = []
    for steps in (nullcontext(), plain_steps()):
        torch.manual_seed(0)
        model = nn.Sequential(Doubled(5, 4) if kind == "odd class" else nn.Linear(5, 4)).double()
        deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"], modules_to_save=[]))
        fill(model)
        if kind == "trained copy":
            copies = deltaw.LoraConfig(target_modules=None, modules_to_save=["0"])
            deltaw.attach(model, copies, "copy")
            fill(model, "copy")
            deltaw.activate(model, {"default": 1.0, "copy": 1.0})
        if kind == "trainable":
            model[0].weight.requires_grad_(True)
        x = leaf()
        with steps:
            y = model(x)
        found.append((y, *torch.autograd.grad(loss(y), [x, *held(model)])))
    for fast, slow in zip(*found, strict=True):
        close(fast, slow, 1e-12)


def test_an_empty_batch_and_a_single_row() -> None:
    model = readers()
    for x in (torch.ones(0, 3, 5), torch.ones(5)):
        x = x.double().requires_grad_()
        y = model(x)
        y.sum().backward()
        assert x.grad.shape == x.shape and y.shape[:-1] == x.shape[:-1]


def test_a_layer_can_be_called_twice_in_one_pass() -> None:
    model = nn.Sequential(nn.Linear(5, 5)).double()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.25))
    layer = fill(model).train()[0]
    assert isinstance(layer, AdaptedLayer)
    x = leaf()
    with drawn() as masks:
        (layer(x) + layer(x)).sum().backward()
    assert len(masks) == 2


@pytest.mark.parametrize("name", ["linear", "linear-without-bias", "gpt2", "embedding", "conv2d"])
def test_the_output_can_be_changed_in_place(name: str) -> None:
    s = setting(name, dtype=torch.float64)
    model = fill(adapt(base(s), s))
    x = s.case.x(s.dtype)
    found = []
    for steps in (nullcontext(), plain_steps()):
        with steps:
            y = model.layer(x)
            y += 1
            y.mul_(2)
            found.append(torch.autograd.grad(loss(y), held(model.layer)))
    for fast, slow in zip(*found, strict=True):
        close(fast, slow, 1e-11)


class InPlace(nn.Module):
    """A residual stream that is written to in place between the blocks that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))
        self.write = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        for read, write in zip(self.read, self.write, strict=True):
            h += write(torch.tanh(read(h)))
        return h


@pytest.mark.parametrize(("autocast", "p"), [(False, 0.25), (True, 0.0), (True, 0.25)])
@pytest.mark.parametrize("graded", [False, True])
def test_an_input_that_is_changed_in_place_is_another_one(
    autocast: bool, p: float, graded: bool
) -> None:
    """Where a cast or a mask is kept instead of it, which lets plain steps go on too."""
    found = []
    for steps in (nullcontext(), plain_steps()):
        torch.manual_seed(0)
        model = InPlace().double() if not autocast else InPlace()
        config = deltaw.LoraConfig(r=2, target_modules=r"read\..*", lora_dropout=p)
        deltaw.attach(model, config)
        fill(model, size=0.5).train()
        dtype = torch.float32 if autocast else torch.float64
        x = torch.linspace(-1, 2, 30, dtype=dtype).view(2, 3, 5).requires_grad_(graded)
        with steps, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(3)
            y = model(x * 1.0)
            found.append((y.detach(), *torch.autograd.grad(loss(y), held(model))))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (5e-2 if autocast else 1e-11) * b.norm()


def test_what_readers_share_goes_with_their_input() -> None:
    """A pass whose loss is dropped leaves nothing behind, and no input waits for the next."""
    model = readers(0.25)
    first = nn.Linear(5, 5).double()
    x = first(leaf())
    gone = weakref.ref(x)
    y = model(x)
    own = model.layers[0].authority.shared
    assert own._masks and own._link is not None
    del x, y
    gc.collect()
    assert gone() is None
    assert not own._masks and own._link is None
