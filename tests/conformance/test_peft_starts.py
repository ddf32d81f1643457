"""Starts beside PEFT's own, and adapters with a start that is subtracted read by PEFT."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft_pair import (
    IDS,
    TARGETS,
    Convolution,
    Mlp,
    Tokens,
    X,
    close,
    gpt2,
    llama,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    peft,
    quiet,
    saved_by_deltaw,
    seeded,
    tensors,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.formats import loralib

IMAGES = torch.linspace(-1, 1, 2 * 4 * 7).view(2, 4, 7)


def started(base: nn.Module, init: str, seed: int = 0, **settings: object) -> nn.Module:
    """Return a copy of `base` with an adapter that began at `init` and moved."""
    model = copy.deepcopy(base)
    settings = {"lora_alpha": 8, "modules_to_save": [], "init_lora_weights": init, **settings}
    deltaw.attach(model, deltaw.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def by_peft(base: nn.Module, init: str, **settings: object) -> nn.Module:
    with quiet():
        config = peft.LoraConfig(init_lora_weights=init, **settings)
        return peft.get_peft_model(copy.deepcopy(base), config)


def factors_of_peft(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "scaling") and "default" in module.lora_A
    }


SETTINGS = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS}


@pytest.mark.parametrize(("init", "theirs"), [("pissa_exact", "pissa"), ("olora", "olora")])
def test_the_part_of_w_that_is_taken_is_pefts(init: str, theirs: str) -> None:
    base = seeded(Mlp)
    ours = copy.deepcopy(base)
    deltaw.attach(ours, deltaw.LoraConfig(**SETTINGS, init_lora_weights=init))
    state = deltaw.capture(ours).layers
    expected = factors_of_peft(by_peft(base, theirs, **SETTINGS))
    assert state.keys() == expected.keys() and len(state) == 3
    for path, (A, B, scale) in expected.items():
        own = state[path].tensors
        close(scale * B @ A, state[path].scale * own["weight.lora_B"] @ own["weight.lora_A"], 1e-5)
        close(A.norm(dim=1), own["weight.lora_A"].norm(dim=1), 1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_trains_as_peft_does(rslora: bool) -> None:
    """20 steps of AdamW from the same A0 and B0, whole SVD, in float32."""
    base = seeded(Mlp)
    theirs = by_peft(base, "pissa", use_rslora=rslora, **SETTINGS)
    ours = copy.deepcopy(base)
    config = deltaw.LoraConfig(**SETTINGS, use_rslora=rslora, init_lora_weights="pissa_exact")
    deltaw.attach(ours, config)
    for path, (A, B, _) in factors_of_peft(theirs).items():
        adapter = ours.get_submodule(path).adapter["default"].weight
        with torch.no_grad():
            for own, value in ((adapter.lora_A, A), (adapter.lora_B, B)):
                own.copy_(value)
            adapter.start_A.copy_(A)
            adapter.start_B.copy_(B)
    assert torch.equal(output(ours.eval(), X), output(base, X))
    losses = []
    for model in (theirs, ours):
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(held, lr=1e-3)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)
    assert losses[0][-1] < 0.95 * losses[0][0]


def test_orthogonal_is_of_pefts_size() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(400, 300))
    settings = {"r": 8, "lora_alpha": 5, "target_modules": ["0"]}
    (theirs,) = factors_of_peft(by_peft(base, "orthogonal", **settings)).values()
    deltaw.attach(base, deltaw.LoraConfig(**settings, init_lora_weights="orthogonal"))
    own = deltaw.capture(base).layers["0"].tensors
    for name, expected in zip("AB", theirs, strict=False):
        ours = own[f"weight.lora_{name}"]
        assert float(ours.std() / expected.std()) == pytest.approx(1, abs=0.1)
        assert torch.linalg.matrix_rank(ours) == torch.linalg.matrix_rank(expected) == 4


def test_lora_ga_takes_the_directions_of_peft() -> None:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    base = seeded(Mlp)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    model, x = copy.deepcopy(base), torch.randn(30, 5)
    with quiet():
        preprocess_loraga(model, config, lambda: (model(x) - 1).square().mean().backward())
        expected = factors_of_peft(peft.get_peft_model(model, config))
    ours = copy.deepcopy(base)
    settings = deltaw.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_ga")
    deltaw.attach(ours, settings, data=[x], loss=lambda m, x: (m(x) - 1).square().mean())
    for path, (A, B, _) in expected.items():
        own = deltaw.capture(ours).layers[path].tensors
        for theirs, mine in ((A.T, own["weight.lora_A"].T), (B, own["weight.lora_B"])):
            a, b = nn.functional.normalize(theirs, dim=0), nn.functional.normalize(mine, dim=0)
            assert (a.T @ b).diagonal().abs().min() > 0.999


def eva_of_peft(base: nn.Module, rho: float) -> dict[str, Tensor]:
    model = by_peft(
        base, "eva", r=2, target_modules=["q_proj", "down_proj"], eva_config=peft.EvaConfig(rho=rho)
    )
    with quiet():
        return peft.get_eva_state_dict(model, [IDS], show_progress_bar=False)


def test_eva_takes_the_directions_of_peft() -> None:
    base = llama()
    expected = {
        name.removeprefix("base_model.model."): A for name, A in eva_of_peft(base, 1.0).items()
    }
    config = deltaw.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="eva_rho_1"
    )
    deltaw.attach(base, config, data=[IDS])
    state = deltaw.capture(base).layers
    assert state.keys() == expected.keys()
    for path, A in expected.items():
        own = state[path].tensors["weight.lora_A"]
        assert ((own @ A.float().T).diagonal().abs() > 0.95).all()  # theirs keep no more than r


# ---------------------------------------------------------------- files


MODELS = {
    "mlp": (lambda: seeded(Mlp), X, {"target_modules": TARGETS}),
    "patterns": (
        lambda: seeded(Mlp),
        X,
        {
            "target_modules": TARGETS,
            "rank_pattern": {"^lin": 2, "out": 5},
            "alpha_pattern": {"lin": 11, "^body.out": 3},
        },
    ),
    "gpt2": (gpt2, IDS, {"target_modules": "all-linear"}),
    "llama": (llama, IDS, {"target_modules": "all-linear"}),
    "sliced": (
        gpt2,
        IDS,
        {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}},
    ),
    "embedding": (
        lambda: seeded(Tokens),
        torch.arange(11).view(1, 11),
        {"target_modules": ["emb", "lin"]},
    ),
    "convolution": (lambda: seeded(lambda: Convolution(1)), IMAGES, {"target_modules": ["conv"]}),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_twice_the_rank_on_the_base_as_it_is(
    name: str, init: str, rslora: bool, tmp_path: Path
) -> None:
    make, x, settings = MODELS[name]
    base = make()
    ours = started(base, init, r=3, lora_alpha=7, use_rslora=rslora, **settings)
    assert not torch.allclose(output(ours, x), output(base, x), atol=1e-3)
    folder = saved_by_deltaw(ours, tmp_path)
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["init_lora_weights"] is True
    close(output(ours, x), output(loaded_by_peft(base, folder), x), 2e-6)
    assert torch.equal(output(ours, x), output(loaded_by_deltaw(base, folder), x))


def test_a_start_comes_back_to_be_trained_on(tmp_path: Path) -> None:
    """Steps before and after saving are those of training without a break."""
    base = seeded(Mlp)
    without = started(base, "pissa", **SETTINGS)
    before = started(base, "pissa", **SETTINGS)
    deltaw.save(before, tmp_path)
    after = copy.deepcopy(base)
    deltaw.load(after, tmp_path, trainable=True)
    for model in (without, after):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(X) - 1).square().mean().backward()
            optimizer.step()
    a, b = without.state_dict(), after.state_dict()
    assert a.keys() == b.keys() and any("start_A" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_start_of_another_adapter_is_ignored(tmp_path: Path) -> None:
    """A file left behind, or one whose factors another program changed."""
    base = seeded(Mlp)
    deltaw.save(started(base, "pissa", **SETTINGS), tmp_path / "old")
    plain = started(base, "gaussian", **SETTINGS)
    deltaw.save(plain, tmp_path / "old")
    assert (tmp_path / "old" / "deltaw_start.safetensors").is_file()
    other = copy.deepcopy(base)
    deltaw.load(other, tmp_path / "old", trainable=True)
    assert not any("start_" in key for key in other.state_dict())
    assert torch.equal(output(other, X), output(plain, X))

    ours = started(base, "pissa", **SETTINGS)
    folder = saved_by_deltaw(ours, tmp_path / "changed")
    changed = {name: t * (1.5 if "lora_B" in name else 1) for name, t in tensors(folder).items()}
    save_file(changed, folder / "adapter_model.safetensors")
    deltaw.load(other, folder, trainable=True, swap=True)
    assert not any("start_" in key for key in other.state_dict())
    assert len(deltaw.capture(other).layers["lin"].tensors["weight.lora_A"]) == 6
    close(output(other, X), output(loaded_by_peft(base, folder), X), 2e-6)


def test_a_start_is_swapped_in_and_out(tmp_path: Path) -> None:
    base = seeded(Mlp)
    expected = []
    for seed, init in enumerate(("pissa", "olora", "gaussian", "pissa")):
        model = started(base, init, seed, **SETTINGS)
        deltaw.save(model, tmp_path / str(seed))
        expected.append(output(model, X))
    for trainable in (False, True):
        model = copy.deepcopy(base)
        deltaw.load(model, tmp_path / "0", trainable=trainable)
        for seed, y in enumerate(expected):
            deltaw.load(model, tmp_path / str(seed), swap=True, trainable=trainable)
            assert torch.equal(output(model.eval(), X), y)
            assert any("start_A" in k for k in model.state_dict()) == (trainable and seed != 2)
    reserved = copy.deepcopy(base)
    deltaw.load(reserved, tmp_path / "2", reserve=6)
    for seed, y in enumerate(expected):
        deltaw.load(reserved, tmp_path / str(seed), swap=True)
        assert torch.equal(output(reserved, X), y)
    half = copy.deepcopy(base)
    deltaw.load(half, tmp_path / "0", dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.bfloat16}
    close(output(half, X), expected[0], 5e-2)


def test_loralibs_file_holds_twice_the_rank(tmp_path: Path) -> None:
    base = seeded(Mlp)
    ours = started(base, "pissa", **SETTINGS)
    deltaw.save(ours, tmp_path / "lora.pt", format="loralib")
    other = copy.deepcopy(base)
    deltaw.attach(other, loralib.read(tmp_path / "lora.pt", lora_alpha=5), trainable=False)
    close(output(ours, X), output(other, X), 2e-6)


def test_the_file_of_the_start_holds_a0_and_b(tmp_path: Path) -> None:
    ours = started(seeded(Mlp), "pissa", **SETTINGS)
    deltaw.save(ours, tmp_path)
    held = load_file(tmp_path / "deltaw_start.safetensors")
    adapter = ours.lin.adapter["default"].weight
    assert torch.equal(held["lin:weight.start_A"], adapter.start_A)
    assert torch.equal(held["lin:weight.lora_B"], adapter.lora_B)
    assert len(held) == 6
