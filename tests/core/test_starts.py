"""Where adapters start: singular vectors against whole decompositions, data, and bad input."""

import math

import pytest
import torch
from models import TOKENS, Tower
from tiny import llama
from torch import Tensor, nn

import deltaw
from deltaw import quant
from deltaw.errors import ConfigError
from deltaw.inits import Site, eva, kind_of, lora_ga, milora, names, olora, orthogonal, pissa
from deltaw.inits._svd import exact, minor, principal
from deltaw.storage import Storage

FROM_WEIGHTS = [name for name in names() if kind_of(name) == "from_weights"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def site(W: Tensor, r: int, scale: float = 1.75, variant: str = "", seed: int = 0) -> Site:
    generator = torch.Generator().manual_seed(seed)
    shape = (W.shape[0], W.shape[1])
    return Site("w", "w", shape, r, scale, "B", generator, lambda: W, variant)


def spectrum(decay: float, out: int = 180, into: int = 260) -> Tensor:
    """A matrix with singular values (1 + j)^-decay."""
    U = torch.linalg.qr(torch.randn(out, out, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(into, out, dtype=torch.float64))[0]
    S = torch.arange(1, out + 1, dtype=torch.float64) ** -decay
    return (U * S @ V.T).float()


def left_over(W: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    """‖W - s B A‖, in float64."""
    return float((W.double() - scale * B.double() @ A.double()).norm())


def optimum(W: Tensor, r: int) -> float:
    return float(torch.linalg.svdvals(W.double())[r:].norm())


def ours(start: object, W: Tensor, r: int, **options: object) -> tuple[Tensor, Tensor]:
    (pair,) = start.from_weights([site(W, r, **options)])  # type: ignore[attr-defined]
    return pair


# ---------------------------------------------------------------- from weights


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("r", [1, 8, 16])
def test_pissa_leaves_what_the_best_approximation_leaves(decay: float, r: int) -> None:
    W = spectrum(decay)
    A, B = ours(pissa, W, r)
    assert A.shape == (r, 260) and B.shape == (180, r) and A.dtype == B.dtype == torch.float32
    assert left_over(W, A, B, 1.75) <= 1.01 * optimum(W, r)


def captured(W: Tensor, U: Tensor) -> float:
    """‖Uᵀ W‖² by that of the best U."""
    best = torch.linalg.svdvals(W.double())[: U.shape[1]].square().sum()
    return float((U.double().T @ W.double()).square().sum() / best)


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
def test_the_subspace_holds_what_the_best_one_holds(decay: float) -> None:
    """Also where the left-over is nearly all of W and tells little."""
    W = spectrum(decay, 300, 400)
    U, _, _ = principal(W, 8, torch.Generator().manual_seed(0))
    assert captured(W, U) >= 0.99
    more, _, _ = principal(W, 8, torch.Generator().manual_seed(0), passes=6)
    assert captured(W, more) >= 0.9999


def test_real_weights(shared) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/stories260K/hf")
    linear = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) > 20
    for W in linear:
        assert left_over(W, *ours(pissa, W, 4), 1.75) <= 1.01 * optimum(W, 4)


def test_products_alone_find_the_vectors() -> None:
    """A matrix wide enough for the random range, with values that decay."""
    W = spectrum(1.0)
    U, S, V = principal(W, 6, torch.Generator().manual_seed(1))
    u, s, v = exact(W, 6)
    torch.testing.assert_close(S, s, rtol=2e-4, atol=0)
    for a, b in ((U, u), (V, v)):
        assert torch.allclose(a.T @ a, torch.eye(6), atol=1e-5)
        assert (a.T @ b).diagonal().abs().min() > 0.999


def test_zeros_have_finite_vectors() -> None:
    U, S, V = principal(torch.zeros(180, 260), 5, torch.Generator().manual_seed(1))
    assert not S.any() and U.isfinite().all() and V.isfinite().all()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_a_matrix_of_low_rank_is_found_whole(size: float) -> None:
    W = torch.randn(200, 3) @ torch.randn(3, 300)
    U, S, V = principal(size * W, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(U * (S / size) @ V.T, W, rtol=0, atol=1e-3)


def pruned(kind: str) -> Tensor:
    W, draw = torch.zeros(400, 500), torch.Generator().manual_seed(0)
    if kind == "rows":
        W[:10] = torch.randn(10, 500, generator=draw)
    elif kind == "columns":
        W[:, :10] = torch.randn(400, 10, generator=draw)
    else:
        W[torch.arange(20), torch.arange(20)] = torch.logspace(0, -9, 20)
    return W


@pytest.mark.parametrize("kind", ["rows", "columns", "elements"])
def test_no_direction_of_a_pruned_weight_counts_twice(kind: str) -> None:
    """What rounding leaves of a direction in the range already lies in the same few rows."""
    W = pruned(kind)
    for seed in range(5):
        U, S, V = principal(W, 16, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(S, torch.linalg.svdvals(W)[:16], rtol=0, atol=1e-4)
        torch.testing.assert_close(U * S @ V.T, W, rtol=0, atol=1e-4)


def test_pissa_is_the_principal_part_divided_by_the_scale() -> None:
    W = torch.randn(7, 9)
    A, B = ours(pissa, W, 3, variant="exact", scale=0.4)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(0.4 * B @ A, U[:, :3] * S[:3] @ Vh[:3])
    torch.testing.assert_close(A.norm(dim=1), (S[:3] / 0.4).sqrt())
    torch.testing.assert_close(B.norm(dim=0), (S[:3] / 0.4).sqrt())


@pytest.mark.parametrize("shape", [(7, 9), (40, 24), (24, 24)])
def test_milora_is_the_minor_part(shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    A, B = ours(milora, W, 3, scale=0.4)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    part = U[:, -3:] * S[-3:] @ Vh[-3:]
    torch.testing.assert_close((0.4 * B @ A).double(), part, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A.norm(dim=1).double(), (S[-3:] / 0.4).sqrt(), rtol=1e-5, atol=0)


def test_small_singular_values_are_resolved() -> None:
    """In float32 a Gram matrix would lose what lies below 3e-4 of the largest."""
    U = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64))[0]
    S = torch.logspace(0, -5, 20, dtype=torch.float64)
    found = minor((U * S @ V.T).float(), 3)
    torch.testing.assert_close(found[1].double(), S[-3:], rtol=2e-2, atol=0)


def test_olora_is_the_first_of_q_and_r() -> None:
    W = torch.randn(11, 7)
    A, B = ours(olora, W, 3)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(B, Q[:, :3])
    torch.testing.assert_close(A, R[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("r", [2, 6])
def test_orthogonal_cancels(r: int) -> None:
    A, B = orthogonal.start(site(torch.zeros(11, 7), r))
    assert A.shape == (r, 7) and B.shape == (11, r)
    assert (B @ A).abs().max() < 1e-7 and A.norm() > 0.1 and B.norm() > 0.1


def test_layers_of_many_shapes_and_ranks_get_their_own() -> None:
    weights = [torch.randn(9, 7) for _ in range(5)] + [torch.randn(7, 9), torch.randn(9, 7)]
    sites = [site(W, 3 if k < 6 else 2, scale=k + 1.0) for k, W in enumerate(weights)]
    for k, (A, B) in enumerate(pissa.from_weights(sites)):
        assert left_over(weights[k], A, B, k + 1.0) == pytest.approx(
            optimum(weights[k], sites[k].r), rel=1e-4
        )


@pytest.mark.parametrize("init", [*FROM_WEIGHTS, "pissa_exact", "pissa_niter_1", "orthogonal"])
def test_training_is_that_of_the_rewritten_base(init: str) -> None:
    """In float32, 20 steps of AdamW: W - s B0 A0 with the adapter on it, as the papers have it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}
    model, rewritten = Tower(), Tower()
    deltaw.attach(model, deltaw.LoraConfig(**settings, init_lora_weights=init))
    state = deltaw.capture(model)
    for path, layer in state.layers.items():
        A, B = layer.tensors["weight.lora_A"], layer.tensors["weight.lora_B"]
        with torch.no_grad():
            rewritten.get_submodule(path).weight.sub_(1.5 * B @ A)
    plain = {
        path: deltaw.LayerState(
            layer.kind,
            {name: t.clone() for name, t in layer.tensors.items() if ".start_" not in name},
            layer.scale,
        )
        for path, layer in state.layers.items()
    }
    deltaw.attach(rewritten, deltaw.State(state.config, plain))
    losses = [curve(one) for one in (model, rewritten)]
    torch.testing.assert_close(*losses, rtol=2e-4, atol=1e-6)
    assert losses[0][-1] < 0.95 * losses[0][0]


def curve(model: nn.Module, steps: int = 20) -> Tensor:
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=2e-3, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(TOKENS) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# ---------------------------------------------------------------- from inputs


def batches(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 13, (5, 7), generator=generator) for _ in range(n)]


def inputs_of(model: nn.Module, path: str, data: list[object]) -> Tensor:
    """All inputs of a layer as rows, by a hook of the test's own."""
    seen = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat(seen)


def directions(X: Tensor) -> tuple[Tensor, Tensor]:
    """Right-singular vectors of the centred rows, and their shares of the variance."""
    _, S, Vh = torch.linalg.svd(X.double() - X.double().mean(0), full_matrices=False)
    return Vh, S.square() / S.square().sum()


def test_eva_takes_the_directions_of_the_inputs_and_shares_ranks() -> None:
    model, r = Tower().eval(), 1
    config = deltaw.LoraConfig(
        r=r, lora_alpha=3, target_modules=[*ATTENTION, "head"], init_lora_weights="eva"
    )
    plan = deltaw.attach(model, config, data=batches())
    state = deltaw.capture(model)
    base = Tower().eval()
    paths = [target.path for target in deltaw.plan(base, config).targets]
    found = {path: directions(inputs_of(base, path, batches())) for path in paths}
    pairs = [(float(share), p) for p, (_, shares) in found.items() for share in shares[: 2 * r]]
    won = [path for _, path in sorted(pairs, key=lambda pair: -pair[0])[: r * len(paths)]]
    ranks = {path: won.count(path) for path in paths if path in won}
    assert {p: len(layer.tensors["weight.lora_A"]) for p, layer in state.layers.items()} == ranks
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == r * len(paths)
    for path, layer in state.layers.items():
        A, B = layer.tensors["weight.lora_A"], layer.tensors["weight.lora_B"]
        best = found[path][0][: len(A)].float()
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5)
        assert (A @ best.T).square().sum() >= 0.999 * len(A)
        assert not B.any() and B.shape[1] == len(A) and layer.scale == 3
        assert "weight.start_A" not in layer.tensors
    assert {t.path: (t.r, t.alpha) for t in plan.targets} == {
        p: (n, 3 * n) for p, n in ranks.items()
    }
    assert plan.parameters == deltaw.summary(model).trainable


def test_eva_with_rho_1_leaves_the_ranks() -> None:
    model = Tower().eval()
    config = deltaw.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="eva_rho_1")
    plan = deltaw.attach(model, config, data=batches())
    assert {target.r for target in plan.targets} == {2} and len(plan.targets) == 12


def test_a_layer_that_wins_no_rank_is_left_out() -> None:
    """Its inputs vary evenly in many directions, those of the other layer in two."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"flat": nn.Linear(40, 4), "steep": nn.Linear(5, 4)})

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model["flat"](x).sum() + model["steep"](x[:, :2] @ two).sum()

    data, two = [torch.randn(50, 40)], torch.linalg.qr(torch.randn(5, 2))[0].T
    config = deltaw.LoraConfig(r=1, target_modules=["flat", "steep"], init_lora_weights="eva")
    plan = deltaw.attach(model, config, data=data, loss=run)
    assert [target.path for target in plan.targets] == ["steep"]
    assert list(deltaw.capture(model).layers) == ["steep"]


def test_inputs_joined_batch_by_batch_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    X = (torch.randn(120, 30) * torch.logspace(0, -2, 30)) @ torch.randn(30, 30) + 5
    generator = torch.Generator().manual_seed(0)
    joined = eva.NONE
    for rows in X.split([50, 1, 40, 29]):
        joined = joined.joined(rows, 30, generator)
    _, shares = directions(X)
    assert joined.count == 120
    torch.testing.assert_close(joined.mean, X.mean(0))
    torch.testing.assert_close(joined.shares().double()[:8], shares[:8], rtol=1e-4, atol=1e-6)


def test_eva_leaves_out_what_is_masked_or_has_no_label() -> None:
    model = llama()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, 3, 4, 5, 6, 7], [-100, -100, 9, 8, 7, 6]])
    ids = torch.arange(12).view(2, 6) * 5 % 32
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    config = deltaw.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="eva_rho_1")
    deltaw.attach(model, config, data=[batch])
    kept = ((mask == 1) & (labels != -100)).flatten()
    path = "model.layers.1.self_attn.o_proj"
    Vh, _ = directions(inputs_of(llama(), path, [batch])[kept])
    A = deltaw.capture(model).layers[path].tensors["weight.lora_A"]
    assert kept.sum() == 7 and (A @ Vh[:2].float().T).square().sum() > 1.999


def test_eva_sees_the_patches_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), 2, padding=1, groups=2)).eval()
    x = torch.randn(3, 4, 9, 8)
    config = deltaw.LoraConfig(r=3, target_modules=["0"], init_lora_weights="eva")
    deltaw.attach(model, config, data=[x])
    patches = nn.functional.unfold(x, (3, 2), padding=1, stride=2)
    rows = patches.view(3, 2, 12, -1).permute(0, 1, 3, 2).flatten(0, 2)
    Vh, _ = directions(rows)
    A = deltaw.capture(model).layers["0"].tensors["weight.lora_A"].flatten(1)
    assert (A @ Vh[:3].float().T).square().sum() > 2.999


# ---------------------------------------------------------------- from gradients


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def gradient(path: str, data: list[Tensor]) -> Tensor:
    model = Tower().eval()
    sum(squares(model, batch) for batch in data).backward()
    return model.get_submodule(path).weight.grad


@pytest.mark.parametrize("path", ["layers.0.attn.q_proj", "layers.2.experts.1", "embed"])
def test_lora_ga_starts_along_the_gradient(path: str) -> None:
    model = Tower().train()
    config = deltaw.LoraConfig(r=2, target_modules=[path], init_lora_weights="lora_ga")
    deltaw.attach(model, config, data=batches(1), loss=squares)
    assert model.training and not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad == (".adapter." in n) for n, p in model.named_parameters())
    G = gradient(path, batches(1))
    U, _, Vh = torch.linalg.svd(G.T if path == "embed" else G, full_matrices=False)
    tensors = deltaw.capture(model).layers[path].tensors
    A, B = tensors["weight.lora_A"], tensors["weight.lora_B"]
    c = U.shape[0] ** 0.25 / 4
    torch.testing.assert_close((A @ Vh[:2].T).abs(), c * torch.eye(2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((B.T @ U[:, 2:4]).abs(), c * torch.eye(2), rtol=1e-3, atol=1e-4)
    assert torch.equal(tensors["weight.start_A"], A) and torch.equal(tensors["weight.start_B"], B)


def test_gradients_are_summed_over_batches() -> None:
    model = Tower().eval()
    path = "layers.1.attn.o_proj"
    config = deltaw.LoraConfig(r=1, target_modules=[path], init_lora_weights="lora_ga")
    deltaw.attach(model, config, data=iter(batches(4)), loss=squares)
    _, _, Vh = torch.linalg.svd(gradient(path, batches(4)))
    A = deltaw.capture(model).layers[path].tensors["weight.lora_A"]
    assert float((A[0] @ Vh[0]).abs() / A.norm()) > 0.999


def test_no_gradient_outlives_its_layers_turn() -> None:
    """When the gradient of a layer is shown, no other parameter holds one."""
    model = Tower().eval()
    held: list[int] = []
    real = lora_ga.principal

    def watched(*args: object, **options: object) -> object:
        held.append(sum(p.grad is not None for p in model.parameters()))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_ga, "principal", watched)
        config = deltaw.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="lora_ga")
        deltaw.attach(model, config, data=batches(2), loss=squares)
    assert held == [0] * 24


def test_gradients_that_were_there_stay() -> None:
    model = Tower().eval()
    squares(model, TOKENS).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    config = deltaw.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="lora_ga")
    deltaw.attach(model, config, data=batches(1), loss=squares)
    after = {n: p.grad for n, p in model.named_parameters() if ".adapter." not in n}
    assert all(torch.equal(before[name], grad) for name, grad in after.items())


def test_a_models_own_loss_is_taken() -> None:
    model = llama()
    ids = torch.arange(24).view(2, 12) % 32
    config = deltaw.LoraConfig(r=2, init_lora_weights="lora_ga")
    deltaw.attach(model, config, data=[{"input_ids": ids, "labels": ids}])
    assert len(deltaw.capture(model).layers) == 14


def test_a_second_adapter_starts_from_the_base_alone() -> None:
    """Not from what the first one makes of it."""
    config = deltaw.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="eva")
    alone = Tower().eval()
    deltaw.attach(alone, config, data=batches(), generator=torch.Generator().manual_seed(0))
    both = Tower().eval()
    deltaw.attach(both, deltaw.LoraConfig(r=2, init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    deltaw.attach(both, config, "second", data=batches(), generator=generator)
    for path, layer in deltaw.capture(alone).layers.items():
        other = deltaw.capture(both, "second").layers[path]
        assert all(torch.equal(t, other.tensors[name]) for name, t in layer.tensors.items())


# ---------------------------------------------------------------- bad input


def refused(model: nn.Module, init: str, *texts: str, **options: object) -> None:
    """One error that says all of it, and the model is as it was."""
    settings = {"r": 2, "target_modules": ATTENTION, **options.pop("settings", {})}
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = deltaw.LoraConfig(init_lora_weights=init, **settings)
    with pytest.raises(ConfigError) as error:
        deltaw.attach(model, config, **options)
    for text in texts:
        assert text in str(error.value)
    assert "Fix: " in str(error.value)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not deltaw.configs(model)
    assert all(p.requires_grad and p.grad is None for p in after.values())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_unknown_names_list_what_is_known() -> None:
    known = "eva, eva_rho_N, gaussian, kaiming, loftq, loftq_iter_N, lora_ga, milora, olora, "
    known += "orthogonal, pissa, "
    for init in ("pisa", "pissa_", "pissa_niter_", "pissa_niter_x", "eva_rho_0.5", "gaussian_2"):
        refused(Tower(), init, repr(init), known + "pissa_exact, pissa_niter_N")


@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_a_rank_that_cannot_be_had(init: str) -> None:
    texts = [
        f"layers.{n}.attn.{p}: its rank of 8 is above min(out, in) = 6"
        for n in range(3)
        for p in ATTENTION
    ]
    refused(Tower(), init, *texts, "by rank_pattern", settings={"r": 8})


def test_ranks_of_other_starts_that_cannot_be_had() -> None:
    text = "layers.2.attn.o_proj: 2 times its rank of 4 is above min(out, in) = 6"
    refused(Tower(), "lora_ga", text, settings={"r": 4}, data=batches(), loss=squares)
    text = "layers.2.attn.o_proj: its rank of 8 is above in = 6"
    refused(Tower(), "eva", text, settings={"r": 8}, data=batches())
    refused(Tower(), "orthogonal", "layers.0.attn.q_proj: its rank of 3 is odd", settings={"r": 3})
    refused(Tower(), "eva_rho_0", "layers.0.attn.q_proj: a rho of 0", data=batches())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_weights_that_are_not_finite(init: str, value: float) -> None:
    model = Tower()
    for path in ("layers.0.attn.k_proj", "layers.1.attn.o_proj"):
        model.get_submodule(path).weight.data[1, 2] = value
    texts = ("layers.0.attn.k_proj: its weight holds NaN", "layers.1.attn.o_proj: its weight")
    refused(model, init, *texts)


@pytest.mark.parametrize("init", [name for name in names() if kind_of(name) != "start"])
def test_weights_on_the_meta_device(init: str) -> None:
    model = Tower().to("meta")
    texts = [f"layers.{n}.attn.q_proj: it is on the meta device" for n in range(3)]
    options = {"data": batches(), "loss": squares} if init in ("eva", "lora_ga") else {}
    if init == "loftq":
        texts = [text.replace("it is", "weight is") for text in texts]
        options = {"absorb": "nf4"}
    refused(model, init, *texts, **options)


def test_starts_without_weights_work_on_the_meta_device() -> None:
    for init in (True, "gaussian", "orthogonal"):
        model = Tower().to("meta")
        deltaw.attach(model, deltaw.LoraConfig(r=2, init_lora_weights=init))
        assert all(p.is_meta for p in model.parameters())


def test_data_that_are_missing_or_not_wanted() -> None:
    for init in ("eva", "eva_rho_1", "lora_ga"):
        refused(Tower(), init, f"init_lora_weights='{init}' starts from data", "data=batches")
        refused(Tower(), init, "hold no batch", data=[], loss=squares)
    refused(Tower(), "pissa", "starts from no data", data=batches())
    with pytest.raises(ConfigError, match="loss goes with data"):
        deltaw.attach(Tower(), deltaw.LoraConfig(), loss=squares)
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="starts from no data"):
        deltaw.attach(Tower(), deltaw.capture(model), data=batches())


def test_data_that_reach_too_little() -> None:
    refused(
        Tower(),
        "eva",
        "layers.0.attn.q_proj: 2 rows of inputs",
        data=[TOKENS[:1, :2]],
    )
    refused(Tower(), "lora_ga", "has no loss to start from", data=batches())

    class Idle(Tower):
        """Two layers that never run."""

        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(10, 10)
            self.spare = nn.Linear(10, 10)

    settings = {"target_modules": ["idle", "spare", "q_proj"]}
    for init, text in (("eva", "{}: 0 rows of inputs"), ("lora_ga", "- {}")):
        texts = [text.format(path) for path in ("idle", "spare")]
        refused(Idle(), init, *texts, data=batches(), loss=squares, settings=settings)


def test_data_that_are_not_finite() -> None:
    model = Tower()
    model.embed.weight.data[5] = math.nan
    refused(model, "eva", "layers.0.attn.q_proj: its inputs hold NaN", data=batches())
    text = "layers.2.attn.o_proj: its gradient holds NaN"
    refused(model, "lora_ga", text, data=batches(), loss=squares)


class Packed(nn.Linear):
    """A weight that some storage keeps packed."""


@pytest.mark.parametrize("init", [*FROM_WEIGHTS, "lora_ga", "eva"])
def test_a_packed_base(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a start goes into the weights and these are packed again; what reads none works."""

    class Halved(Storage):
        def fits(self, layer: nn.Module) -> bool:
            return isinstance(layer, Packed)

        def read(self, layer: nn.Module) -> Tensor:
            return layer._parameters["weight"]

        def store(self, layer: nn.Module, W: Tensor) -> dict[str, Tensor]:
            return {"weight": W}

    monkeypatch.setattr(quant, "storages", lambda: (Halved(),))
    model = nn.ModuleDict({name: Packed(6, 6) for name in ATTENTION})

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return sum(layer(x).square().sum() for layer in model.values())

    data = {"data": [torch.randn(20, 6)], "loss": run} if init in ("lora_ga", "eva") else {}
    if init != "eva":
        way = "absorb=True" if init in FROM_WEIGHTS else "absorb on a model in full precision"
        texts = [f"{name}: its weight is packed, as Halved" for name in ATTENTION]
        texts.append(f"by {way}")
        refused(model, init, *texts, **data)
    else:
        deltaw.attach(model, deltaw.LoraConfig(r=2, init_lora_weights=init), **data)


@pytest.mark.parametrize("returned", [None, 1.5, "loss"])
def test_a_loss_that_is_no_tensor_is_refused(returned: object) -> None:
    def loss(model: nn.Module, batch: object) -> object:
        model(batch)
        return returned

    text = f"not {returned!r}"
    refused(Tower(), "lora_ga", text, settings={"r": 2}, data=batches(), loss=loss)
