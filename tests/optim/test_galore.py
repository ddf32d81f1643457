"""GaLore's step: the paper's equations in float64, torch's AdamW, and galore-torch."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import galore_torch
import numpy as np
import pytest
import torch
from benchmarks import shapes
from tests.core.models import Tower
from tests.core.tiny import bert, gpt2, llama
from torch import nn

import deltaw
from deltaw.errors import ConfigError, StateError, TargetError
from deltaw.optim import galore
from deltaw.optim._subspace import basis
from deltaw.optim.galore import GaLoreAdamW

SHAPES = [(7, 5), (5, 7), (6, 6), (40, 30), (30, 40)]
PROJECTED = {"rank": 3, "update_proj_gap": 3, "scale": 0.7, "exact_svd": True}


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients that change from step to step around one that stays."""
    draw = torch.Generator().manual_seed(3)
    stays = torch.randn(shape, generator=draw, dtype=torch.float64)
    noise = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(steps)]
    return [(stays + 0.5 * more).to(dtype) for more in noise]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    draw = torch.Generator().manual_seed(4)
    return nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype))


def steps(optimizer: torch.optim.Optimizer, W: nn.Parameter, G: Sequence[torch.Tensor]) -> None:
    for grad in G:
        W.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_a_step_is_the_papers(shape: tuple[int, int], proj_type: str) -> None:
    """W <- (1 - lr decay) W - lr s P N, N of Adam on PᵀG, P the leading vectors of every third G.

    Which sign a singular vector has is left open by the paper, and is taken over here.
    """
    left = {
        "std": shape[0] < shape[1],
        "reverse_std": shape[0] >= shape[1],
        "left": True,
        "right": False,
    }[proj_type]
    (b1, b2), eps, decay, s = (0.8, 0.95), 1e-3, 0.3, PROJECTED["scale"]
    W = weight(shape)
    optimizer = GaLoreAdamW(
        [{"params": [W], "proj_type": proj_type, **PROJECTED}],
        lr=0.1,
        betas=(b1, b2),
        eps=eps,
        weight_decay=decay,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ours = W.detach().numpy().copy()
    P, m, v = np.zeros(0), np.zeros(()), np.zeros(())
    for t, G in enumerate(gradients(shape, 8, torch.float64), 1):
        lr = 0.1 * 0.9 ** (t - 1)
        W.grad = G
        optimizer.step()
        schedule.step()
        g = G.numpy()
        if t % 3 == 1:
            U, _, Vh = np.linalg.svd(g)
            P = U[:, :3] if left else Vh[:3].T
            theirs = optimizer.state[W]["projector"].numpy()
            P = P * np.sign((P * theirs).sum(0))
            np.testing.assert_allclose(theirs, P, atol=1e-10)
        r = P.T @ g if left else g @ P
        m = b1 * m + (1 - b1) * r
        v = b2 * v + (1 - b2) * r**2
        N = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        ours = ours - lr * decay * ours - lr * s * (P @ N if left else N @ P.T)
        np.testing.assert_allclose(W.detach().numpy(), ours, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_rank_it_is_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.2}
    for shape in [(7, 5), (4,), (2, 3, 4)]:
        G = gradients(shape, 6, dtype)
        ours, theirs = weight(shape, dtype), weight(shape, dtype)
        steps(GaLoreAdamW([ours], **options), ours, G)
        steps(torch.optim.AdamW([theirs], foreach=False, **options), theirs, G)
        assert torch.equal(ours, theirs)
    assert (
        GaLoreAdamW([ours]).defaults.items()
        >= {
            key: torch.optim.AdamW([theirs]).defaults[key]
            for key in ("lr", "betas", "eps", "weight_decay")
        }.items()
    )


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33)], ids=str)
def test_step_for_step_as_galore_torch(shape: tuple[int, int], proj_type: str) -> None:
    """Their ε lies before the bias correction and their decay after the step: both are off.

    Their `"reverse_std"` mixes up the sides of a square.
    """
    proj_type = "left" if proj_type == "reverse_std" and shape[0] == shape[1] else proj_type
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": proj_type}
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}
    G = gradients(shape, 8, torch.float32)
    W = weight(shape, torch.float32)
    copy = nn.Parameter(W.detach().clone())
    ours = GaLoreAdamW([{"params": [W], "exact_svd": True, **group}], **options)
    other = galore_torch.GaLoreAdamW(
        [{"params": [copy], **group}], no_deprecation_warning=True, **options
    )
    for grad in G:
        steps(ours, W, [grad])
        steps(other, copy, [grad])
        torch.testing.assert_close(W, copy, rtol=0, atol=2e-6)
    assert (W - weight(shape, torch.float32)).abs().max() > 0.005


def test_a_sketch_finds_the_leading_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(90, 60, generator=draw, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(60, 60, generator=draw, dtype=torch.float64))
    G = U * torch.logspace(0, -3, 60, dtype=torch.float64) @ V.T
    for left, exact in ((False, V[:, :8]), (True, U[:, :8])):
        P = basis(G, 8, left=left, exact=False, seed=1)
        torch.testing.assert_close(P.T @ P, torch.eye(8, dtype=torch.float64))
        torch.testing.assert_close((P.T @ exact).abs(), torch.eye(8).double(), atol=1e-3, rtol=0)
    flat = torch.randn(90, 60, generator=draw)
    P, best = (basis(flat, 8, left=False, exact=exact, seed=1) for exact in (False, True))
    assert (flat @ P).norm() > 0.97 * (flat @ best).norm()


def test_a_sketch_depends_on_its_seed_alone() -> None:
    G = torch.randn(50, 40)
    state = torch.get_rng_state()
    first = basis(G, 4, left=True, exact=False, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(basis(G, 4, left=True, exact=False, seed=7), first)
    assert not torch.equal(basis(G, 4, left=True, exact=False, seed=8), first)


def test_a_small_matrix_is_decomposed_in_full() -> None:
    G = torch.randn(12, 13)
    wanted = basis(G, 3, left=True, exact=True, seed=0)
    assert torch.equal(basis(G, 3, left=True, exact=False, seed=0), wanted)


def test_a_half_precision_gradient_is_decomposed_in_float32() -> None:
    G = torch.randn(60, 50).bfloat16()
    P = basis(G, 5, left=True, exact=True, seed=0)
    assert P.dtype == torch.bfloat16
    assert torch.equal(P, basis(G.float(), 5, left=True, exact=True, seed=0).bfloat16())


def test_all_linear_layers_are_projected_and_nothing_else() -> None:
    model = llama()
    plain, projected, vectors = galore.groups(model, rank=5)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for p in projected["params"]}
    assert inside == {n for n in names.values() if "_proj." in n}
    left = {names[id(p)] for p in [*plain["params"], *vectors["params"]]}
    assert left == set(names.values()) - inside
    assert {k: v for k, v in projected.items() if k != "params"} == {
        "rank": 5,
        "update_proj_gap": 200,
        "scale": 0.25,
        "proj_type": "std",
        "exact_svd": False,
        "optim_bits": 32,
    }
    assert set(plain) == {"params"}
    assert {names[id(p)] for p in vectors["params"]} == {n for n in left if "norm" in n}
    assert vectors["weight_decay"] == 0.0


def test_targets_are_named_as_in_a_lora_config() -> None:
    model = llama()
    for targets, wanted in (
        (["q_proj"], ["q_proj", "q_proj"]),
        (r".*layers\.1\.mlp\..*_proj", ["gate_proj", "up_proj", "down_proj"]),
        (["1.self_attn"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (["lm_head"], ["lm_head"]),
    ):
        found = galore.projected(model, 3, targets)
        names = [
            n.split(".")[-2] for n, p in model.named_parameters() if any(p is q for q in found)
        ]
        assert names == wanted
    with pytest.raises(TargetError, match=r"'q_prj' \(nearest: q_proj"):
        galore.projected(model, 3, ["q_prj"])


def test_heads_tables_and_what_a_rank_would_not_shrink_are_left_to_adamw() -> None:
    def names(model: nn.Module, rank: int) -> set[str]:
        found = galore.projected(model, rank)
        return {
            n.split(".", 1)[-1] for n, p in model.named_parameters() if any(p is q for q in found)
        }

    found = names(bert(), 2)
    assert "pooler.dense.weight" in found
    assert not [n for n in found if "embed" in n or "classifier" in n or "bias" in n]
    assert names(gpt2(), 2) == {
        f"h.{i}.{path}.weight"
        for i in range(2)
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    tied = llama(tie=True)
    assert not [n for n in names(tied, 3) if "embed" in n or "head" in n]
    assert all(min(p.shape) > 12 for p in galore.projected(llama(), 12))
    assert len(galore.projected(llama(), 11)) > len(galore.projected(llama(), 12))
    with pytest.raises(TargetError, match=r"both sides above rank=24(.|\n)*Fix: use a lower rank"):
        galore.projected(llama(), 24)


def test_frozen_weights_are_not_projected() -> None:
    model = llama()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    found = galore.groups(model, rank=3)
    held = {id(p) for group in found for p in group["params"]}
    assert held == {id(p) for p in model.model.layers[1].parameters()}


def test_a_model_without_a_trained_matrix_is_refused() -> None:
    model = llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    for names in ("all-linear", ["q_proj"]):
        with pytest.raises(
            TargetError, match=r"is trained: they are frozen, or packed(.|\n)*Fix: un"
        ):
            galore.groups(model, rank=3, target_modules=names)


def test_adapters_are_refused() -> None:
    model = Tower()
    deltaw.attach(
        model, deltaw.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head"])
    )
    with pytest.raises(StateError) as caught:
        galore.groups(model, rank=2)
    for text in (
        "layers.2.attn.q_proj.adapter.default.weight.lora_B",
        "head.adapter.default.weight.trained",
        "Fix: train adapters by AdamW or LoRA+",
    ):
        assert text in str(caught.value)
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("lora_A")]
    with pytest.raises(ConfigError, match=r"q_proj\.adapter\.default\.weight\.lora_A belongs to"):
        GaLoreAdamW([{"params": named, "rank": 2}])


def test_every_setting_out_of_range_is_named() -> None:
    group = {
        "params": [weight((3, 3)), weight((3,)), weight((2, 3, 4))],
        "rank": 0,
        "update_proj_gap": 0.5,
        "scale": math.inf,
        "proj_type": "full",
        "exact_svd": "yes",
        "optim_bits": 4,
    }
    with pytest.raises(ConfigError) as caught:
        GaLoreAdamW([group], lr=-1, betas=(0.9, 1.0), eps=math.nan, weight_decay=-0.1)
    for text in (
        "lr must be a number of 0 or more, got -1",
        "betas must be two numbers in [0, 1), got (0.9, 1.0)",
        "eps must be",
        "weight_decay must be",
        "rank must be a whole number above 0, got 0",
        "update_proj_gap must be a whole number above 0, got 0.5",
        "scale must be a number above 0, got inf",
        "proj_type must be one of std, reverse_std, left, right, got 'full'",
        "exact_svd must be True or False, got 'yes'",
        "optim_bits must be 8 or 32, got 4",
        "parameter 1 has the shape (3,) and is no matrix",
        "parameter 2 has the shape (2, 3, 4) and is no matrix",
    ):
        assert text in str(caught.value)
    optimizer = GaLoreAdamW([weight((3, 3))])
    with pytest.raises(ConfigError, match="rank must be"):
        optimizer.add_param_group({"params": [weight((3, 3))], "rank": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_has_no_directions(broken: float) -> None:
    W = weight((6, 5))
    optimizer = GaLoreAdamW([{"params": [W], "rank": 2}])
    before = W.detach().clone()
    G = torch.ones(6, 5, dtype=torch.float64)
    G[2, 3] = broken
    with pytest.raises(StateError, match=r"gradient of a weight \(6, 5\) holds NaN or Inf"):
        steps(optimizer, W, [G])
    assert torch.equal(W, before)


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = GaLoreAdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(StateError, match=r"weight \(5, 3\) has a sparse gradient(.|\n)*Fix: "):
        optimizer.step()


def test_what_has_no_gradient_stays_and_a_closure_is_called() -> None:
    W, idle = weight((6, 5)), weight((6, 5))
    optimizer = GaLoreAdamW([{"params": [W, idle], "rank": 2}])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert torch.equal(idle, weight((6, 5)))
    assert idle not in optimizer.state


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.ndim)


def test_the_state_of_the_88m_llama_is_65_percent_smaller() -> None:
    """Counted on one weight of each shape, of which the Llama has many."""
    model = shapes.empty("llama-88m")
    ours = theirs = 0
    for group in galore.groups(model, rank=128):
        settings = {key: value for key, value in group.items() if key != "params"}
        for shape in {p.shape for p in group["params"]}:
            W = nn.Parameter(torch.randn(shape))
            W.grad = torch.randn(shape)
            count = sum(p.shape == shape for p in group["params"])
            for optimizer in (GaLoreAdamW([{"params": [W], **settings}]), torch.optim.AdamW([W])):
                optimizer.step()
                if isinstance(optimizer, GaLoreAdamW):
                    ours += count * bytes_of(optimizer)
                else:
                    theirs += count * bytes_of(optimizer)
    assert theirs == 2 * 4 * sum(p.numel() for p in model.parameters())
    assert ours < 0.35 * theirs


def resumed(optimizer: GaLoreAdamW, W: nn.Parameter, path: Any) -> tuple[GaLoreAdamW, nn.Parameter]:
    torch.save(optimizer.state_dict(), path)
    copy = nn.Parameter(W.detach().clone())
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k in PROJECTED}
    again = GaLoreAdamW([{"params": [copy], **settings}])
    again.load_state_dict(torch.load(path, weights_only=True))
    return again, copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("done", [2, 3, 4])
def test_a_loaded_state_goes_on_exactly(dtype: torch.dtype, done: int, tmp_path: Any) -> None:
    G = gradients((40, 30), 9, dtype)
    W = weight((40, 30), dtype)
    optimizer = GaLoreAdamW(
        [{"params": [W], "rank": 4, "update_proj_gap": 3}], lr=0.02, betas=(0.7, 0.9)
    )
    steps(optimizer, W, G[:done])
    again, copy = resumed(optimizer, W, tmp_path / "optimizer.pt")
    steps(optimizer, W, G[done:])
    steps(again, copy, G[done:])
    assert torch.equal(W, copy)
    assert again.param_groups[0]["betas"] == (0.7, 0.9)
    assert not torch.equal(W, weight((40, 30), dtype))


def test_a_loaded_state_shares_nothing_with_where_it_came_from() -> None:
    W, copy = weight((6, 5)), weight((6, 5))
    first, second = (GaLoreAdamW([{"params": [p], "rank": 2}]) for p in (W, copy))
    steps(first, W, gradients((6, 5), 2, torch.float64))
    second.load_state_dict(first.state_dict())
    before = first.state[W]["exp_avg"].clone()
    steps(second, copy, gradients((6, 5), 1, torch.float64))
    assert torch.equal(first.state[W]["exp_avg"], before)


@pytest.mark.parametrize("copied", [False, True])
def test_adapters_are_refused_without_names(copied: bool) -> None:
    model = Tower()
    base = list(model.head.parameters())
    deltaw.attach(model, deltaw.LoraConfig(r=4, target_modules=["q_proj"]))
    model = copy.deepcopy(model) if copied else model
    held = [p for n, p in model.named_parameters() if ".adapter." in n]
    with pytest.raises(ConfigError, match="parameter 0 belongs to an adapter"):
        GaLoreAdamW([{"params": held, "rank": 2}])
    GaLoreAdamW([{"params": base[:1], "rank": 2}])
