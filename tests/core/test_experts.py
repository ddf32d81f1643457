"""Parameters adapted on their own: which are taken, what reads them, what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.mixtures import IDS, MODELS, NAMES, gpt_oss, mixtral
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.errors import ConfigError, FormatError, StateError, TargetError
from deltaw.layers.experts import Experts
from deltaw.weight import AdaptedWeight, Thin

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.experts


def settings(**options: object) -> deltaw.LoraConfig:
    own = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": NAMES}
    return deltaw.LoraConfig(**(own | options))


def filled(model: nn.Module, name: str = "default", seed: int = 0, **options: object) -> nn.Module:
    deltaw.attach(model, settings(**options), name)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in sorted(model.named_parameters()):
        if f".{name}." in path:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_implementation_is_the_merged_model(
    make: Callable[[], nn.Module], implementation: str
) -> None:
    """Whichever product runs, with ΔW in the weights of a plain model under the eager one."""
    model = filled(make(), rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 7})
    plain = make()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Experts):
                for slot, adapter in module.parts("default").items():
                    scale = {"down_proj": 5 / 2, "gate_up_proj": 7 / 3}[slot]
                    A, B = adapter.lora_A, adapter.lora_B
                    order = "eio" if module.is_transposed else "eoi"
                    delta = scale * torch.einsum(f"eor,eri->{order}", B, A)
                    plain.get_parameter(f"{path}.{slot}").add_(delta)
    plain.set_experts_implementation("eager")
    expected = logits(plain)
    assert (expected - logits(make())).abs().max() > 1e-3
    model.set_experts_implementation(implementation)
    close(logits(model), expected)
    with deltaw.merged(model):
        close(logits(model), expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradients_are_those_of_every_implementation(make: Callable[[], nn.Module]) -> None:
    """And of the same ΔW formed as a matrix, which is what autograd differentiates itself."""
    model = filled(make())
    found = []
    for implementation in (*IMPLEMENTATIONS, "formed"):
        model.set_experts_implementation(implementation.replace("formed", "eager"))
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if implementation == "formed":
                patch.setattr(AdaptedWeight, "__getitem__", lambda self, key: self.dense()[key])
            model(IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 8
    for grads in found[:-1]:
        assert grads.keys() == found[-1].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[-1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_idle_experts_get_no_gradient(implementation: str) -> None:
    model = filled(mixtral())
    model.set_experts_implementation(implementation)
    experts = experts_of(model)
    x, weights = torch.randn(5, 16), torch.full((5, 2), 0.5)
    index = torch.tensor([[0, 3], [3, 0], [0, 3], [0, 3], [3, 0]])
    experts(x, index, weights).square().sum().backward()
    for adapter in experts.parts("default").values():
        for factor in (adapter.lora_A, adapter.lora_B):
            assert [bool(grad.any()) for grad in factor.grad] == [True, False, False, True]


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_one_graph(implementation: str) -> None:
    model = filled(mixtral())
    model.set_experts_implementation(implementation)
    experts = experts_of(model)
    x, weights = torch.randn(5, 16), torch.full((5, 2), 0.5)
    index = torch.tensor([[0, 3], [1, 0], [2, 3], [0, 3], [1, 0]])
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    close(compiled(x, index, weights), experts(x, index, weights))


def test_no_delta_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(weight: AdaptedWeight) -> Tensor:
        raise AssertionError("the sum was formed")

    monkeypatch.setattr(AdaptedWeight, "dense", dense)
    for make in MODELS.values():
        model = filled(make())
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            model.train()(IDS, labels=IDS).loss.backward()


def test_the_base_is_untouched() -> None:
    base, model = mixtral(), mixtral()
    expected = logits(base)
    deltaw.attach(model, settings())
    assert torch.equal(logits(model), expected)
    filled(model, "second")
    deltaw.activate(model, {"default": 1.0, "second": 0.5})
    with deltaw.disabled(model):
        assert torch.equal(logits(model), expected)
    deltaw.detach(model)
    assert torch.equal(logits(model), expected)
    assert type(experts_of(model)) is type(experts_of(base))
    assert vars(experts_of(model)).keys() == vars(experts_of(base)).keys()


def test_names_in_the_model_and_the_plan() -> None:
    model = mixtral()
    plan = deltaw.attach(model, settings(rank_pattern={r"layers\.1\..*down_proj": 2}))
    assert plan is not None
    assert [(t.name, t.r, t.stack, t.shapes) for t in plan.targets] == [
        ("model.layers.0.mlp.experts.gate_up_proj", 3, 4, ((48, 16),)),
        ("model.layers.0.mlp.experts.down_proj", 3, 4, ((16, 24),)),
        ("model.layers.1.mlp.experts.gate_up_proj", 3, 4, ((48, 16),)),
        ("model.layers.1.mlp.experts.down_proj", 2, 4, ((16, 24),)),
    ]
    assert "experts   48x16 x4" in str(plan)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    path = "model.layers.1.mlp.experts.adapter.default"
    assert trained[f"{path}.gate_up_proj.lora_A"] == (4, 3, 16)
    assert trained[f"{path}.gate_up_proj.lora_B"] == (4, 48, 3)
    assert trained[f"{path}.down_proj.lora_A"] == (4, 2, 24)
    assert plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert deltaw.summary(model).trainable == plan.parameters


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_every_expert_starts_on_its_own(start: bool | str) -> None:
    """As one linear layer of its width would: U(±1/sqrt(in)), or N(0, 1/r²)."""
    model = mixtral()
    generator = torch.Generator().manual_seed(0)
    deltaw.attach(model, settings(r=64, init_lora_weights=start), generator=generator)
    for slot, width in (("gate_up_proj", 16), ("down_proj", 24)):
        adapter = experts_of(model).parts("default")[slot]
        assert not adapter.lora_B.any()
        A = adapter.lora_A.detach()
        assert not torch.equal(A[0], A[1])
        for one in A:
            if start is True:
                assert one.abs().max() <= width**-0.5
                assert abs(one.std() * (3 * width) ** 0.5 - 1) < 0.1
            else:
                assert abs(one.std() * 64 - 1) < 0.1


class Plain(nn.Module):
    """A linear layer, and the same product of a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.inner = nn.Module()
        self.inner.matrix = nn.Parameter(self.linear.weight.detach().clone())
        self.inner.vector = nn.Parameter(torch.ones(7))
        self.inner.counts = nn.Parameter(torch.ones(3, 2, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x))


REFUSED: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown": (
        {"target_parameters": ["inner.matrx", "lin"], "rank_pattern": {"nowhere": 2}},
        ("target_parameters 'inner.matrx' (nearest: inner.matrix", "target_parameters 'lin'"),
    ),
    "a vector": ({"target_parameters": ["vector"]}, ("inner.vector: it has 1 dimensions",)),
    "numbers": ({"target_parameters": ["counts"]}, ("inner.counts: it holds torch.int64",)),
    "twice": (
        {"target_parameters": ["linear.weight"], "target_modules": ["linear"]},
        ("linear.weight: its module is adapted as a whole",),
    ),
    "in full": (
        {"target_parameters": ["head.weight"], "modules_to_save": ["head"]},
        ("head.weight: it is trained in full",),
    ),
    "settings": (
        {
            "target_parameters": ["matrix"],
            "lora_dropout": 0.1,
            "lora_bias": True,
            "method": "dora",
        },
        ("lora_dropout=0.1: PEFT", "lora_bias=True", "method='dora'"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    options, fragments = REFUSED[name]
    model = Plain()
    with pytest.raises(TargetError) as caught:
        deltaw.attach(model, settings(**options))
    for fragment in (*fragments, "Fix: "):
        assert fragment in str(caught.value)
    assert not any("adapter" in name for name, _ in model.named_modules())


def test_starts_that_are_subtracted_are_refused() -> None:
    with pytest.raises(ConfigError, match="inner: parameters adapted on their own start from A"):
        deltaw.attach(Plain(), settings(target_parameters=["matrix"], init_lora_weights="olora"))
    even = settings(target_parameters=["matrix"], init_lora_weights="orthogonal", r=2)
    with pytest.raises(TargetError, match=r"inner\.matrix cannot start where B A is not zero"):
        deltaw.attach(Plain(), even)


def test_names_are_a_list() -> None:
    with pytest.raises(ConfigError, match="target_parameters must be a list of names"):
        deltaw.LoraConfig(target_parameters="experts.w")


def test_rows_cannot_be_told_apart() -> None:
    model = filled(mixtral())
    with (
        pytest.raises(StateError, match=r"layers\.0\.mlp\.experts applies its parameters to tok"),
        deltaw.rows(model, ["default", None]),
    ):
        model(IDS)
    with deltaw.rows(model, [None, None]):
        assert torch.equal(logits(model), logits(mixtral()))


def test_a_reserve_is_refused(tmp_path: Path) -> None:
    deltaw.save(filled(mixtral()), tmp_path)
    with pytest.raises(StateError, match="factors of parameters have no reserve"):
        deltaw.load(mixtral(), tmp_path, reserve=8)
    with pytest.raises(FormatError, match="it has no adapters of parameters"):
        deltaw.save(filled(mixtral()), tmp_path / "one.pt", format="loralib")


def test_swapping_in_place(tmp_path: Path) -> None:
    for seed in (1, 2):
        deltaw.save(filled(mixtral(), seed=seed), tmp_path / str(seed))
    model = mixtral()
    deltaw.load(model, tmp_path / "1")
    before = [p.data_ptr() for p in model.parameters()]
    deltaw.load(model, tmp_path / "2", swap=True)
    assert [p.data_ptr() for p in model.parameters()] == before
    close(logits(model), logits(filled(mixtral(), seed=2)), 0)


def test_biases_of_experts_are_trained_beside() -> None:
    model = gpt_oss()
    deltaw.attach(model, settings(bias="lora_only"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
    path = "model.layers.{}.mlp.experts.adapter.default.{}_proj_bias.trained"
    assert trained == {path.format(i, name) for i in (0, 1) for name in ("gate_up", "down")}
    before = logits(model)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1.0)
    assert (logits(model) - before).abs().max() > 1e-3


def test_verify_sees_experts() -> None:
    model = mixtral()
    deltaw.attach(model, settings())
    deltaw.verify(model, {"input_ids": IDS, "labels": IDS})


# ---------------------------------------------------------------- the weight itself


def weight(*shape: int, weights: float = 1.0) -> tuple[AdaptedWeight, Tensor]:
    """A stack and the sum that it stands for."""
    generator = torch.Generator().manual_seed(3)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    *stack, rows, columns = shape
    W, L, R = noise(*shape), noise(*stack, rows, 2), noise(*stack, 2, columns)
    return AdaptedWeight(W, [Thin(L, R, 1.5, weights)]), W + weights * 1.5 * L @ R


READS: dict[str, tuple[tuple[int, ...], Callable[[object], Tensor]]] = {
    "linear": ((7, 5), lambda W: F.linear(torch.ones(3, 5).double(), W, torch.ones(7).double())),
    "linear of one": ((4, 7, 5), lambda W: F.linear(torch.ones(3, 5).double(), W[2])),
    "linear by a tensor": (
        (4, 7, 5),
        lambda W: F.linear(torch.ones(5).double(), W[torch.tensor(1)]),
    ),
    "from the left": ((5, 7), lambda W: torch.ones(3, 5).double() @ W),
    "from the right": ((4, 7, 5), lambda W: W @ torch.ones(4, 5, 2).double()),
    "bmm": ((4, 7, 5), lambda W: torch.bmm(W, torch.ones(4, 5, 2).double())),
    "bmm from the left": ((4, 5, 7), lambda W: torch.bmm(torch.ones(4, 2, 5).double(), W)),
    "mm": ((5, 7), lambda W: torch.mm(torch.ones(3, 5).double(), W)),
    "gathered": (
        (4, 7, 5),
        lambda W: torch.bmm(W[torch.tensor([3, 1, 3])], torch.ones(3, 5, 1).double()),
    ),
    "a slice": ((4, 7, 5), lambda W: W[1:3] @ torch.ones(2, 5, 2).double()),
    "the transpose": ((4, 7, 5), lambda W: torch.ones(4, 2, 7).double() @ W.mT.transpose(-1, -2)),
}
OTHERS: dict[str, tuple[tuple[int, ...], Callable[[object], Tensor]]] = {
    "einsum": ((4, 7, 5), lambda W: torch.einsum("eoi->oi", W)),
    "a sum": ((4, 7, 5), lambda W: W.sum(0)),
    "rows of a matrix": ((7, 5), lambda W: W[2]),
    "a mask": ((4, 7, 5), lambda W: W[torch.tensor([True, False, True, False])]),
    "a tuple": ((4, 7, 5), lambda W: W[1, 2:4]),
    "other dimensions": ((4, 7, 5), lambda W: W.transpose(0, 1)),
    "concatenated": ((7, 5), lambda W: torch.cat([W, W])),
    "by name": ((7, 5), lambda W: F.linear(input=torch.ones(3, 5).double(), weight=W)),
}


@pytest.mark.parametrize("name", [*READS, *OTHERS])
@pytest.mark.parametrize("weights", [1.0, -0.5])
def test_reading_is_reading_the_sum(name: str, weights: float) -> None:
    shape, read = (READS | OTHERS)[name]
    adapted, total = weight(*shape, weights=weights)
    torch.testing.assert_close(read(adapted), read(total), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", READS)
def test_products_form_no_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, read = READS[name]
    adapted, total = weight(*shape)
    monkeypatch.setattr(AdaptedWeight, "dense", None)
    torch.testing.assert_close(read(adapted), read(total), rtol=1e-12, atol=1e-12)


def test_it_looks_like_its_parameter() -> None:
    adapted, total = weight(4, 7, 5)
    assert (adapted.shape, adapted.dtype, len(adapted)) == (total.shape, total.dtype, 4)
    assert adapted.device == total.device
    assert adapted.numel() == total.numel()
    with pytest.raises(AttributeError):
        adapted.__nothing__  # noqa: B018
