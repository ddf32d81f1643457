"""Rows of one batch under adapters of their own: equal to each row alone, trained too."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from core.tiny import bert, gpt2, llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw.errors import StateError
from deltaw.kernels import bank as banks
from deltaw.kernels.batched import Batched
from deltaw.kernels.linear import Term
from deltaw.kernels.segments import Segments
from deltaw.layers import linear
from laws.building import adapt, base, fill
from laws.cases import CASES, Case, Stack
from laws.product import Setting
from laws.running import over_cases
from laws.test_law03_oracle import close

Names = Sequence[str | None]
MIXES: dict[str, Names] = {
    "each its own": ("a", "b", "c", "d"),
    "in equal groups": ("b", "b", "a", "a"),
    "in unequal groups": ("a", "a", "a", "c"),
    "mixed up": ("b", "a", "b", "c"),
    "some under none": (None, "b", None, "a"),
    "all the same": ("c", "c", "c", "c"),
    "none": (None, None, None, None),
}
MIX = pytest.mark.parametrize("names", MIXES.values(), ids=MIXES)


def alone(model: nn.Module, x: Tensor, names: Names, times: int = 1) -> Tensor:
    """Each row by itself, under its own adapter."""
    outputs = []
    for row, part in enumerate(x.split(times)):
        deltaw.activate(model, names[row])
        outputs.append(model(part))
    return torch.cat(outputs)


def four(setting: Setting, trainable: bool = True) -> nn.Module:
    """A layer with adapters a, b, c and d, of other ranks where the geometry has one."""
    model = base(setting)
    for seed, name in enumerate("abcd"):
        own = setting.but(rank=(seed + 1, 5.0 - seed)) if setting.case.form == "config" else setting
        fill(adapt(model, own, name, seed), name, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())
    return model


def low_rank(case: Case) -> bool:
    in_rows = case.file != "attention" or case.layer().batch_first
    return case.name != "embedding-max-norm" and case.form != "parameter" and in_rows


@pytest.mark.parametrize("bias", ["none", "all"])
@over_cases(low_rank)
def test_every_layer(case: Case, bias: str) -> None:
    every_way(case, bias)


@over_cases(lambda case: low_rank(case) and case.form == "config")
def test_every_layer_under_dora(case: Case) -> None:
    every_way(case, method="dora")


def every_way(case: Case, bias: str = "none", method: str = "lora") -> None:
    """With k rows for each row of the batch, and in the second pass as in the first."""
    form = case.form == "config"
    setting = Setting(
        case,
        torch.float64,
        bias=bias if form else "none",
        lora_bias=case.file == "linear",
        method=method,
    )
    for trainable in (True, False):
        model = four(setting, trainable)
        for names in MIXES.values():
            for times in (1, 3):
                x = torch.cat([case.x(torch.float64, seed)[:2] for seed in range(2 * times)])
                expected = alone(model, x, names, times).detach()
                with deltaw.rows(model, names):
                    for _ in range(3):
                        close(model(x), expected, 1e-12)
                        with torch.no_grad():
                            close(model(x), expected, 1e-12)


@MIX
def test_half_precision(names: Names) -> None:
    setting = Setting(CASES[0], torch.bfloat16)
    model = four(setting, trainable=False)
    x = torch.cat([setting.case.x(torch.bfloat16, seed) for seed in range(2)])
    expected = alone(model, x, names)
    with torch.no_grad(), deltaw.rows(model, names):
        for _ in range(2):
            assert model(x).dtype == torch.bfloat16
            close(model(x), expected, 3e-2)


def test_the_ways_agree() -> None:
    """Segments, batched and masked, on rows that all three can do."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    terms = [
        Term(noise(r, 5), noise(7, r), 0.5 + k, shift)
        for k, (r, shift) in enumerate(((3, None), (1, noise(7)), (4, None)))
    ]
    x, y = noise(6, 2, 5), noise(6, 2, 7)
    bank = banks.stacked(terms, torch.float64)
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    found = [y.clone() for _ in range(4)]
    Segments([slice(2 * k, 2 * k + 2) for k in range(3)]).add(found[0], x, terms)
    Batched().add(found[3], x, terms)
    banks.add_batched(found[1], x, bank)
    banks.add_masked(found[2], x, bank, index)
    close(found[1], found[0], 1e-13)
    close(found[2], found[0], 1e-13)
    close(found[3], found[0], 1e-13)
    assert not torch.allclose(found[0], y)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) + y * y).sum()


def same_gradients(model: nn.Module, x: Tensor, names: Names) -> None:
    """All gradients are those of the rows alone; what has none there has none."""
    expected = loss(alone(model, x, names))
    if expected.requires_grad:
        expected.backward()
    wanted = gradients(model)
    wanted_x, x.grad = x.grad, None
    model.zero_grad()
    with deltaw.rows(model, names):
        total = loss(model(x))
        if total.requires_grad:
            total.backward()
    for name, gradient in gradients(model).items():
        if wanted[name] is None:
            assert gradient is None, name
        else:
            close(gradient, wanted[name], 1e-11)
    if wanted_x is not None:
        close(x.grad, wanted_x, 1e-11)


@MIX
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("linear", "gpt2")], ids=str)
def test_what_trains_in_part(case: Case, names: Names) -> None:
    """One factor alone, a bias on B, the base's bias; and without a gradient for the input."""
    setting = Setting(case, torch.float64, lora_bias=case.file == "linear")
    model = four(setting)
    for name, parameter in model.named_parameters():
        frozen = "a.weight.lora_A" in name or "b.weight.lora_B" in name or "c.weight" in name
        parameter.requires_grad_(not frozen and not name.endswith("layer.weight"))
    x = torch.cat([case.x(torch.float64, seed)[:2] for seed in range(2)])
    same_gradients(model, x.requires_grad_(), names)
    model.zero_grad()
    same_gradients(model, x.detach(), names)
    model.zero_grad()
    same_gradients(model.requires_grad_(True), x.detach(), names)


@MIX
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("linear", "fused-101", "gpt2", "conv1d", "embedding")],
    ids=str,
)
def test_each_row_trains_its_own_adapter(case: Case, names: Names) -> None:
    """As alone; what has no row has no gradient and does not move, bit for bit."""
    setting = Setting(case, torch.float64)
    model = four(setting)
    for parameter in (p for n, p in model.named_parameters() if ".adapter." not in n):
        parameter.requires_grad_(False)
    x = torch.cat([case.x(torch.float64, seed)[:2] for seed in range(2)])
    x = x.requires_grad_() if x.is_floating_point() else x
    same_gradients(model, x, names)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(held, lr=0.1, weight_decay=0.5).step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.grad is not None)


def groups_train_their_own() -> None:
    model = four(Setting(CASES[0], torch.float64))
    same_gradients(model, torch.randn(4, 3, 5, dtype=torch.float64), MIXES["each its own"])


def test_dropout_masks_each_row_of_its_own() -> None:
    """In training, with the mask of a plain pass over the same input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    config = deltaw.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, config, name)
        fill(model, name, seed)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    whole = {}
    for name in "ab":
        deltaw.activate(model, name)
        torch.manual_seed(7)
        whole[name] = model.train()(x.clone())
    torch.manual_seed(7)
    with deltaw.rows(model, ["a", "b", None, "a"]):
        y = model(x)
    close(y[[0, 3]], whole["a"][[0, 3]], 1e-12)
    close(y[1], whole["b"][1], 1e-12)
    close(y[2], model[0].base(x)[2], 1e-12)


def test_dropout_masks_the_gradients_of_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double().train()
    config = deltaw.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, config, name)
        fill(model, name, seed)
    wanted = torch.zeros_like(x)
    for name, rows in (("a", slice(0, 2)), ("b", slice(2, 4))):
        deltaw.activate(model, name)
        torch.manual_seed(7)
        model(x)[rows].square().sum().backward()
        wanted[rows], x.grad = x.grad[rows], None
    factors = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    with deltaw.rows(model, ["a", "a", "b", "b"]):
        model(x).square().sum().backward()
    close(x.grad, wanted, 1e-12)
    for name, gradient in gradients(model).items():
        if factors[name] is not None:
            close(gradient, factors[name], 1e-12)


@pytest.mark.parametrize("names", [["a", "b", "a", "b"], ["a", "a", "b", "b"]], ids=str)
def test_dropout_without_gradients_stays_out_of_the_base_and_of_what_is_kept(names: Names) -> None:
    """Frozen adapters in training mode draw anew in every pass, and none is left in evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double().train()
    config = deltaw.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4)
    for seed, name in enumerate("ab"):
        deltaw.attach(model, config, name, trainable=False)
        fill(model, name, seed)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = alone(model.eval(), x, names)
        with deltaw.rows(model.train(), names):
            passes = torch.stack([model(x) for _ in range(4000)])
            close(passes.mean(0), expected, 0.1)
            assert passes.std(0).min() > 1e-3
            model.eval()
            for _ in range(3):
                close(model(x), expected, 1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_frozen_factors_are_stacked_once_in_a_block(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not gradients are enabled, as long as nothing needs them."""
    made: list[object] = []
    real = linear.stacked
    monkeypatch.setattr(linear, "stacked", lambda *of: made.append(of) or real(*of))
    model = four(Setting(CASES[0], torch.float64), trainable=False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.set_grad_enabled(grad), deltaw.rows(model, list("abcd")):
        for _ in range(4):
            model(x)
    assert len(made) == 1


def test_adapters_that_begin_to_train_within_a_block() -> None:
    model = four(Setting(CASES[0], torch.float64), trainable=False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with deltaw.rows(model, list("abcd")):
        with torch.no_grad():
            for _ in range(3):
                model(x)
        model.requires_grad_(True)
        before = model(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
            assert not torch.allclose(model(x), before)
        with pytest.raises(StateError, match="while rows have adapters of their own"):
            model.load_state_dict(model.state_dict())
    close(model_in_rows(model, x), alone(model, x, list("abcd")), 1e-12)


def model_in_rows(model: nn.Module, x: Tensor) -> Tensor:
    with deltaw.rows(model, list("abcd")):
        return model(x)


@pytest.mark.parametrize("names", [["a", "b", "a", "b"], ["b", "b", "b", "b"]], ids=str)
def test_compiled_with_copies_of_their_own(names: Names) -> None:
    """A bias or a head per adapter, whatever is active outside."""
    torch._dynamo.reset()
    model = four(Setting(CASES[0], torch.float64, bias="all", head=True), trainable=False).eval()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = alone(model, x, names)
        deltaw.activate(model, "a")
        compiled = torch.compile(model, backend="eager")
        with deltaw.rows(model, names):
            close(compiled(x), expected, 1e-12)


def test_overflow_of_one_adapter_stays_in_its_rows() -> None:
    model = four(Setting(CASES[0], torch.float64), trainable=False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    names = ["a", "b", "a", "b"]
    with torch.no_grad():
        expected = alone(model, x, names)
        model.layer.adapter["a"]["weight"].lora_A.fill_(torch.inf)
        with deltaw.rows(model, names):
            for _ in range(3):
                y = model(x)
                close(y[[1, 3]], expected[[1, 3]], 1e-12)
                assert not y[[0, 2]].isfinite().all()


class PastForward(nn.Module):
    """Reads the bias past the layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_bias_that_is_read_past_the_forward() -> None:
    model = PastForward()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["layer"], bias="all"), "a")
    with (
        deltaw.rows(model, ["a", None]),
        pytest.raises(StateError, match=r"has its bias read past its forward"),
    ):
        model(torch.randn(2, 5))


def test_autocast() -> None:
    model = four(Setting(CASES[0]))
    x = torch.randn(4, 3, 5)
    names = ["a", "a", "b", "b"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(model, x, names)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), deltaw.rows(model, names):
                for _ in range(3):
                    y = model(x)
                    assert y.dtype == expected.dtype
                    close(y, expected, 3e-2)


def test_checkpointing() -> None:
    model = four(Setting(CASES[0], torch.float64))
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for checkpointed in (False, True):
        with deltaw.rows(model, ["a", "b", None, "a"]):
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            y.square().sum().backward()
        found.append({n: g for n, g in gradients(model).items() if g is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    with deltaw.rows(model, ["a", "b", None, "a"]):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(StateError, match="backward"):
        y.sum().backward()


def two_heads() -> nn.Module:
    """Two adapters, each with a head of its own."""
    model = bert().double()
    for seed, name in enumerate("ab"):
        deltaw.attach(model, deltaw.LoraConfig(r=2, bias="lora_only"), name)
        fill(model, name, seed)
    return model


def test_a_head_for_each_adapter() -> None:
    model = two_heads()
    ids = torch.arange(12).view(4, 3)
    names = ["b", None, "a", "b"]
    expected = alone(lambda_(model), ids, names)
    with deltaw.rows(model, names):
        close(model(ids).logits, expected, 1e-12)
    assert not torch.allclose(expected[0], expected[3])


def lambda_(model: nn.Module) -> nn.Module:
    """The model with its logits as output; adapters are found inside."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    return Logits()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(make: Callable[[], nn.Module], beams: int) -> None:
    model = make()
    for seed, name in enumerate("ab"):
        deltaw.attach(model, deltaw.LoraConfig(r=2 + seed), name, trainable=False)
        fill(model, name, seed, size=0.4)
    ids = torch.randint(1, 32, (4, 5), generator=torch.Generator().manual_seed(2))
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    names = ["b", None, "a", "b"]
    expected = []
    for name, row in zip(names, ids, strict=True):
        deltaw.activate(model, name)
        expected.append(model.generate(row[None], **options))
    with deltaw.rows(model, names):
        found = model.generate(ids, **options)
    assert torch.equal(found, torch.cat(expected))
    assert len({tuple(row.tolist()) for row in found[:, 5:]}) > 1


def test_flattened_tokens() -> None:
    """A layer that sees batch x sequence rows takes those of each row one after another."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model = Flat().double()
    for seed, name in enumerate("ab"):
        deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["layer"]), name)
        fill(model, name, seed)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    names = ["b", "a", None, "b"]
    expected = alone(model, x, names)
    with deltaw.rows(model, names):
        close(model(x), expected, 1e-12)


def test_compiled() -> None:
    """One graph for any assignment of the same adapters."""
    model = four(Setting(CASES[0]), trainable=False)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        for names in (["a", "b", None, "a"], ["a", "b", "b", None], ["a", None, None, "b"]):
            with deltaw.rows(model, names):
                found = compiled(x)
            close(found, alone(model, x, names), 1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_values_of_trained_adapters_are_never_kept(method: str, init: bool | str) -> None:
    """A step within the block counts in the next pass, also without gradients."""
    model = four(Setting(CASES[0], torch.float64, method=method, init=init))
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    names = ["a", "b", "c", "d"]
    with deltaw.rows(model, names), torch.no_grad():
        for _ in range(2):
            model(x)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        found = model(x)
    with torch.no_grad():
        close(found, alone(model, x, names), 1e-12)


def test_a_block_can_be_entered_again_and_nested() -> None:
    blocks_are_fresh()


def blocks_are_fresh() -> None:
    model = four(Setting(CASES[0], torch.float64), trainable=False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    first, second = ["a", "b", "c", "d"], ["d", "c", None, "a"]
    outer, inner = deltaw.rows(model, first), deltaw.rows(model, second)
    with torch.no_grad():
        expected = [alone(model, x, names) for names in (first, second)]
        deltaw.activate(model, "b")
        whole = model(x)
        for _ in range(2):
            with outer:
                close(model(x), expected[0], 1e-12)
                with inner:
                    close(model(x), expected[1], 1e-12)
                close(model(x), expected[0], 1e-12)
                with deltaw.disabled(model):
                    close(model(x), model.shift(model.layer.base(x)), 1e-12)
            assert torch.equal(model(x), whole)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        with outer:
            close(model(x), alone_outside(model, x, first), 1e-12)


def alone_outside(model: nn.Module, x: Tensor, names: Names) -> Tensor:
    return alone(copy.deepcopy(model), x, names)


def test_copies_are_outside_the_block() -> None:
    model = four(Setting(CASES[0], torch.float64))
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with deltaw.rows(model, ["a", "b", "c", "d"]):
        other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))


def test_an_exception_leaves_the_block_behind() -> None:
    model = four(Setting(CASES[0]))
    with pytest.raises(ZeroDivisionError), deltaw.rows(model, ["a"]):
        _ = 1 / 0
    assert model.authority.rows is None


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "attach": lambda m: deltaw.attach(m, deltaw.LoraConfig(target_modules=["layer"]), "new"),
    "detach": lambda m: deltaw.detach(m, "a"),
    "activate": lambda m: deltaw.activate(m, "a"),
    "merge": lambda m: deltaw.merge(m),
    "verify": lambda m: deltaw.verify(m, torch.ones(4, 5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_changed_within_a_block(change: Callable[[nn.Module], object]) -> None:
    model = four(Setting(CASES[0]))
    with (
        deltaw.rows(model, ["a", "b"]),
        pytest.raises(StateError, match=r"while rows have adapters of their own.*\n.*leave"),
    ):
        change(model)


def test_what_cannot_be_given() -> None:
    model = four(Setting(CASES[0]))
    with pytest.raises(StateError, match=r"'x'\n.*'y'\nFix: the adapters are: a, b, c, d"):
        deltaw.rows(model, ["a", "x", None, "y", "x"])
    for nonsense in ("a", [], ()):
        with pytest.raises(StateError, match="Rows need one adapter"):
            deltaw.rows(model, nonsense)
    with pytest.raises(StateError, match="no adapters"):
        deltaw.rows(nn.Linear(2, 2), ["a"])
    rows = deltaw.rows(model, ["a", "b"])
    with deltaw.merged(model), pytest.raises(StateError, match="merged"), rows:
        pass
    deltaw.detach(model, "b")
    with pytest.raises(StateError, match="there is no adapter 'b'"), rows:
        pass


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_rows_that_do_not_match_name_the_module(count: int) -> None:
    model = Stack().eval()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["embed", "up"]), "a")
    message = rf"embed got {count} rows, and 3 rows of the batch.*\nFix: give deltaw.rows one entry"
    with pytest.raises(StateError, match=message), deltaw.rows(model, ["a", None, "a"]):
        model(torch.ones(count, 7, dtype=torch.int64))


def test_a_layer_with_several_inputs_says_so() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x, x)

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y + self.bias

    model = Two()
    deltaw.attach(model, deltaw.LoraConfig(target_modules=None, modules_to_save=["head"]), "a")
    with pytest.raises(StateError, match="head has several inputs"), deltaw.rows(model, ["a"] * 4):
        model(torch.ones(4, 5))


def test_a_module_of_several_outputs_says_so() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 4, batch_first=True)})
    for name in "ab":
        deltaw.attach(model, deltaw.LoraConfig(target_modules=None, modules_to_save=["lstm"]), name)
    x = torch.randn(2, 3, 5)
    with (
        pytest.raises(StateError, match="lstm is trained in full and returns a tuple"),
        deltaw.rows(model, ["a", "b"]),
    ):
        model["lstm"](x)


def test_rows_say_that_they_cannot_be_differentiated_twice() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    for name in "ab":
        deltaw.attach(model, deltaw.LoraConfig(r=2), name)
        fill(model, name)
    x = torch.randn(2, 5, requires_grad=True)
    with deltaw.rows(model, ["a", "b"]):
        gradient = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="rows have adapters of their own cannot be diff"):
        gradient.sum().backward()
